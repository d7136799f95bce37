// The first layer of points, also for the voxels of grids that do not separate into maps (formulation.h). Points are processed
// in waves: a wave is a region of the box (1, 1, points).
//
// Each point gathers its taps (texel rows with weights) from planes whose texels are stored as rows of channels. These are
// either the planes projected through the first layer, whose sum is z_1, or the planes themselves, whose samples are multiplied
// by W_1. In backward each point adds its gradient to its taps' texels with integer atomics: a wave's gradients are scaled so
// that the largest has 45 bits and rounded to 64-bit integers, whose sum is the same in any order. If a gradient is not finite,
// the gradients of all texels become NaN.
#pragma once
#include "../formulation.h"
#include "context.cuh"
#include "points_kernels.cuh"
#include "region.cuh"
#include "scale.cuh"

namespace tcam {

template <class Real_>
class Points {
 public:
  using Real = Real_;

  explicit Points(Context<Real>& context)
      : c(context),
        p(context.p),
        grid_(p.points < 0),
        objects_(grid_ ? 1 : p.batch),
        projected_(gathers_projections(p, objects_, context.first_width() * static_cast<int64_t>(sizeof(Real)))),
        samples_(matrix_count(p)),
        row_(projected_ ? context.first_width() : static_cast<int>(p.channels)) {
    n_[2] = p.points;
    if (grid_) n_[2] = (p.hi[0] - p.lo[0]) * (p.hi[1] - p.lo[1]) * (p.hi[2] - p.lo[2]);
    for (int q = 0; q < p.plane_count; ++q) {
      base_[q] = texel_rows_;
      texel_rows_ += objects_ * texels(q);
    }
  }

  const int64_t* box() const { return n_; }
  int64_t rounds() const { return grid_ ? p.batch : 1; }  // a grid's objects one after another; all points at once
  int64_t voxel_bytes() const {                           // workspace for a point of a wave, beside the MLP's
    int64_t each = p.plane_count * static_cast<int64_t>(sizeof(TexelTaps<Real>));
    if (!projected_)
      each += (samples_ + p.group_count) * p.channels * static_cast<int64_t>(sizeof(Real)) * (c.backward ? 2 : 1);
    return each;
  }

  template <class Input>
  void carve(Carver& ws, const Regions& regions) {
    most_ = regions.most();
    texel_values_ = ws.array<Real>(texel_rows_ * row_);
    taps_ = ws.array<TexelTaps<Real>>(most_ * p.plane_count);
    if (!projected_) sampled_ = ws.array<Real>(samples_ * most_ * p.channels);
    if (p.reduce == TCAM_PRODUCT) product_ = ws.array<Real>(p.group_count * most_ * p.channels);
    if (!c.backward) return;
    if (!projected_) grad_sampled_ = ws.array<Real>(samples_ * most_ * p.channels);
    if (p.reduce == TCAM_PRODUCT) grad_product_ = ws.array<Real>(p.group_count * most_ * p.channels);
    if (!p.grad_planes && !(projected_ && p.grad_decoder)) return;
    grad_texels_ = ws.array<Real>(texel_rows_ * row_);
    fixed_ = ws.array<unsigned long long>(texel_rows_ * row_);
    largest_ = ws.array<float>(scale_blocks);
    scale_ = ws.array<float>(2);
  }
  void carve_partials(Carver& ws) {
    for (int b = 0; b < blocks(); ++b) weight_partials_[b] = ws.array<Real>(splits() * c.first_width() * block_width(b));
    bias_partials_ = ws.array<Real>(splits() * c.first_width());
  }

  // Stores the texels of the round's objects as rows, projected or not. `volume` receives the features of a decoder without
  // layers.
  void begin(const tcam_inputs& in, int64_t round, const Volume& volume) {
    in_ = &in;
    round_ = round;
    volume_ = volume;
    for (int q = 0; q < p.plane_count; ++q)
      for (int64_t slot = 0; slot < objects_; ++slot) {
        const Real* plane = plane_of(in.planes, q, grid_ ? round : slot);
        Real* to = texel_values_ + (base_[q] + slot * texels(q)) * row_;
        if (projected_)
          c.texel_product(texels(q), row_, p.channels, 0, Transposed<Real>{plane, texels(q)},
                          Transposed<Real>{block_weight(block_of(q)), p.width[0]}, WriteRows<Real>{to, row_, nullptr});
        else
          c.run_elements(to_rows_kernel<Real>, texels(q) * row_, plane, texels(q), row_, to);
      }
  }
  void begin_gradients() {
    if (!grad_texels_) return;
    c.clear(grad_texels_, texel_rows_ * row_ * static_cast<int64_t>(sizeof(Real)));
    c.clear(fixed_, texel_rows_ * row_ * 8);
  }

  // Computes z_1 of a wave, z (points of the wave, n_1), or without layers writes the points' features to the output.
  void forward(const Region& wave, Real* z) {
    const int64_t count = wave.voxels(), channels = p.channels;
    const int n1 = c.first_width();
    c.run_elements(place_kernel<Real>, count * p.plane_count, planes(), wave.k0, count, taps_);
    if (projected_) {
      gather({0, p.plane_count}, count, c.biases[1], z);
    } else {
      for (int s = 0; s < samples_; ++s) gather(planes_of_matrix(p, s), count, nullptr, sample(sampled_, s));
      for (int g = 0; product_ && g < p.group_count; ++g) {
        const PlaneRange group = planes_of_group(p, g);
        c.run_elements(product_kernel<Real>, count * channels, sample(sampled_, group.begin), group.count(), most_ * channels,
                       count * channels, sample(product_, g));
      }
      if (!p.layers) {
        if (!c.backward)
          copy_features(wave, product_ ? product_ : sampled_, false);  // volume_ is their gradient on the way back
        return;
      }
      if (p.noise_std != 0) add_noise(wave);
      for (int b = 0; b < plane_blocks(); ++b) {
        const Rows<Real> features = {sample(product_ ? product_ : sampled_, b), channels};
        const Transposed<Real> weight = {block_weight(b), p.width[0]};
        if (b)
          c.product(count, n1, channels, 0, features, weight, AddRows<Real>{z, n1});
        else
          c.product(count, n1, channels, 0, features, weight, WriteRows<Real>{z, n1, c.biases[1]});
      }
    }
    if (p.extra)
      c.product(count, n1, p.extra, 0, extra(wave), Transposed<Real>{block_weight(plane_blocks()), p.width[0]},
                AddRows<Real>{z, n1});
  }

  // Takes delta_1 of a wave, delta (points of the wave, n_1), or without layers the output's gradient. Adds to the partial sums
  // of W_1 and b_1 and to the texels' gradients; writes the gradients of coordinates and extra features.
  void backward(const Region& wave, const Real* delta, const tcam_gradients& to) {
    const int64_t count = wave.voxels();
    const int n1 = c.first_width();
    if (p.layers && p.grad_decoder) c.add_column_sums(delta, count, n1, voxel_chunk, bias_partials_);
    if (!projected_) back_to_samples(wave, delta);
    if (p.extra && p.grad_decoder) weight_gradient(plane_blocks(), count, delta, extra(wave));
    if (p.extra && p.grad_extra)
      c.product(count, static_cast<int>(p.extra), n1, 0, Rows<Real>{delta, n1},
                Rows<Real>{block_weight(plane_blocks()), p.width[0]},
                WriteRows<Real>{static_cast<Real*>(to.extra) + first_extra(wave), p.extra, nullptr});
    if (p.grad_points) {
      const int64_t step = projected_ ? 0 : most_ * p.channels;
      const PointGradient<Real> call = {planes(), projected_ ? delta : grad_sampled_, step, texel_values_, row_, wave.k0,
                                        count,    static_cast<Real*>(to.points)};
      c.run_warps(points_gradient_kernel<Real>, count, call);
    }
    if (grad_texels_) scatter(count, delta);
  }

  // Computes the gradients of the round's planes from those of the texels and, with projected planes, adds to the partial sums
  // of W_1.
  void end(const tcam_inputs& in, int64_t round, const tcam_gradients& to) {
    if (!grad_texels_) return;
    const int channels = static_cast<int>(p.channels);
    for (int q = 0; q < p.plane_count; ++q)
      for (int64_t slot = 0; slot < objects_; ++slot) {
        const int64_t object = grid_ ? round : slot;
        const int b = block_of(q);
        const Real* grad = grad_texels_ + (base_[q] + slot * texels(q)) * row_;
        Real* out = p.grad_planes ? const_cast<Real*>(plane_of(to.planes, q, object)) : nullptr;
        if (!projected_) {
          c.run_elements(from_rows_kernel<Real>, texels(q) * row_, grad, texels(q), row_, out);
          continue;
        }
        if (p.grad_decoder)
          c.texel_product(row_, channels, texels(q), ceil_div(texels(q), texel_splits), Transposed<Real>{grad, row_},
                          Transposed<Real>{plane_of(in.planes, q, object), texels(q)},
                          AddPartial<Real>{weight_partials_[b], row_, p.channels, nullptr});
        if (out)
          c.texel_product(texels(q), channels, row_, 0, Rows<Real>{grad, row_}, Rows<Real>{block_weight(b), p.width[0]},
                          WriteTransposed<Real>{out, texels(q)});
      }
  }
  void write_gradients() {
    const int64_t n1 = c.first_width();
    for (int b = 0, column = 0; b < blocks(); column += block_width(b), ++b)
      c.combine({weight_partials_[b], splits(), n1 * block_width(b), block_width(b)}, n1, block_width(b), nullptr,
                c.grad_weights[1] + column, p.width[0]);
    if (c.grad_biases[1]) c.combine({bias_partials_, splits(), n1, n1}, 1, n1, nullptr, c.grad_biases[1], n1);
  }

 private:
  Context<Real>& c;
  const tcam_problem& p;
  const bool grid_;
  const int64_t objects_;    // objects in a round
  const bool projected_;     // whether points gather projected planes
  const int samples_, row_;  // number of matrices of sampled features; channels of a texel row
  // n_: the box (1, 1, points); most_: points of a wave; base_[q]: plane q's first row among all texel_rows_ texel rows.
  int64_t n_[3] = {1, 1, 0}, most_ = 0, texel_rows_ = 0, base_[TCAM_MAX_PLANES] = {};
  const tcam_inputs* in_ = nullptr;  // the round's inputs
  int64_t round_ = 0;
  Volume volume_ = {};
  // texel_values_, grad_texels_ (texel_rows_, row_); sampled_, grad_sampled_ (samples_, most_, channels); product_,
  // grad_product_ (groups, most_, channels): the products of the samples of each group. Null: not needed.
  Real *texel_values_ = nullptr, *sampled_ = nullptr, *product_ = nullptr, *grad_texels_ = nullptr, *grad_sampled_ = nullptr,
       *grad_product_ = nullptr;
  TexelTaps<Real>* taps_ = nullptr;
  unsigned long long* fixed_ = nullptr;
  float *largest_ = nullptr, *scale_ = nullptr;
  Real *weight_partials_[TCAM_MAX_PLANES + 1] = {}, *bias_partials_ = nullptr;

  // The number of partial sums of W_1's gradient: enough for sums over texels and for sums over a wave's points.
  int64_t splits() const {
    const int64_t of_points = ceil_div(most_, voxel_chunk);
    return of_points > texel_splits ? of_points : texel_splits;
  }
  // W_1's blocks of columns: one for each group of planes, then one for the extra features.
  int plane_blocks() const { return p.group_count; }
  int blocks() const { return p.layers ? plane_blocks() + (p.extra ? 1 : 0) : 0; }
  int block_width(int b) const { return static_cast<int>(b < plane_blocks() ? p.channels : p.extra); }
  int block_of(int q) const { return p.planes[q].group; }
  const Real* block_weight(int b) const { return c.weights[1] + b * p.channels; }

  int64_t texels(int q) const { return p.planes[q].rows * p.planes[q].columns; }
  const Real* plane_of(const void* const* planes, int q, int64_t object) const {
    return static_cast<const Real*>(planes[q]) + object * p.channels * texels(q);
  }
  Real* sample(Real* all, int s) const { return all + s * most_ * p.channels; }

  PointPlanes<Real> planes() const {
    PointPlanes<Real> all = {};
    all.count = p.plane_count;
    all.axes = p.axes;
    for (int q = 0; q < p.plane_count; ++q) {
      all.row_axis[q] = p.planes[q].row_axis, all.column_axis[q] = p.planes[q].column_axis;
      all.rows[q] = p.planes[q].rows, all.columns[q] = p.planes[q].columns, all.base[q] = base_[q];
      all.matrix[q] = matrix_of(p, q), all.scale[q] = static_cast<Real>(plane_scale(p, q));
    }
    all.align_corners = p.align_corners != 0, all.corners = p.corners != 0;
    all.padding = p.padding;
    all.points = grid_ ? nullptr : static_cast<const Real*>(in_->points);
    all.objects = in_->objects;
    all.each = grid_ ? 1 : p.points / p.batch, all.object_count = objects_;
    all.bounds = in_->bounds ? in_->bounds + round_ * 6 : nullptr;
    all.box = grid_box(p);
    return all;
  }

  void gather(PlaneRange planes, int64_t count, const Real* bias, Real* out) {
    c.run_warps(gather_points_kernel<Real>, count, taps_, p.plane_count, planes.begin, planes.end, count, texel_values_, row_,
                bias, out);
  }
  void add_noise(const Region& wave) {
    const PointNoise<Real> noise = {planes(),
                                    p.noise_seed,
                                    static_cast<Real>(p.noise_std),
                                    round_,
                                    plane_blocks(),
                                    static_cast<int>(p.channels),
                                    most_ * p.channels,
                                    product_ ? product_ : sampled_};
    c.run_warps(add_noise_kernel<Real>, wave.voxels(), noise, wave.k0, static_cast<int64_t>(wave.voxels()));
  }
  int64_t first_extra(const Region& wave) const { return ((grid_ ? round_ * n_[2] : 0) + wave.k0) * p.extra; }
  Rows<Real> extra(const Region& wave) const { return {static_cast<const Real*>(in_->extra) + first_extra(wave), p.extra}; }

  // Copies the wave's features from `arrays` to the output or, with `read`, the output's gradient to `arrays`.
  void copy_features(const Region& wave, Real* arrays, bool read) {
    const int64_t count = wave.voxels(), channels = plane_blocks() * p.channels;
    char* at = static_cast<char*>(volume_.data) + wave.k0 * channels * dtype_bytes(volume_.dtype);
    c.run_elements(features_kernel<Real>, count * channels, arrays, plane_blocks(), most_ * p.channels,
                   static_cast<int>(p.channels), count, at, volume_.dtype, read);
  }

  // Adds delta_1^T operand to the partial sums of the gradient of W_1's block b. operand: (count, block_width(b)).
  void weight_gradient(int b, int64_t count, const Real* delta, Rows<Real> operand) {
    c.product(c.first_width(), block_width(b), count, voxel_chunk, Transposed<Real>{delta, c.first_width()}, operand,
              AddPartial<Real>{weight_partials_[b], c.first_width(), block_width(b), nullptr});
  }
  // Computes the gradients of the sampled features from delta_1, and adds to the partial sums of W_1's blocks for the planes.
  void back_to_samples(const Region& wave, const Real* delta) {
    const int64_t count = wave.voxels(), channels = p.channels;
    const bool wanted = p.grad_planes || p.grad_points;
    Real* grad = grad_product_ ? grad_product_ : grad_sampled_;
    for (int b = 0; p.layers && b < plane_blocks(); ++b) {
      if (p.grad_decoder) weight_gradient(b, count, delta, {sample(product_ ? product_ : sampled_, b), channels});
      if (wanted)
        c.product(count, static_cast<int>(channels), c.first_width(), 0, Rows<Real>{delta, c.first_width()},
                  Rows<Real>{block_weight(b), p.width[0]}, WriteRows<Real>{sample(grad, b), channels, nullptr});
    }
    if (!p.layers) copy_features(wave, grad, true);
    for (int g = 0; grad_product_ && wanted && g < p.group_count; ++g) {
      const PlaneRange group = planes_of_group(p, g);
      c.run_elements(product_back_kernel<Real>, count * channels, sample(sampled_, group.begin), sample(grad_product_, g),
                     group.count(), most_ * channels, count * channels, sample(grad_sampled_, group.begin));
    }
  }

  void scatter(int64_t count, const Real* delta) {
    const int parts = projected_ ? 1 : samples_;  // all parts share one scale
    auto part = [&](int s) { return projected_ ? delta : sample(grad_sampled_, s); };
    int read = 0;
    for (int s = 0; s < parts; ++s) {
      const int64_t values = count * row_, most = scale_blocks / parts;
      const unsigned grid = static_cast<unsigned>(values < most * threads ? ceil_div(values, threads) : most);
      c.run(largest_kernel, grid, threads, reduce_bytes, part(s), sizeof(Real) == 8 ? TCAM_F64 : TCAM_F32, values,
            largest_ + read);
      read += static_cast<int>(grid);
    }
    c.run(scale_kernel, 1, 1, 0, largest_, read, 0.f, 1.f, fixed_exponent, NAN, scale_);
    for (int s = 0; s < parts; ++s) {
      const PlaneRange planes = projected_ ? PlaneRange{0, p.plane_count} : planes_of_matrix(p, s);
      c.run_warps(scatter_points_kernel<Real>, count, taps_, p.plane_count, planes.begin, planes.end, count, part(s), row_,
                  scale_, fixed_);
    }
    c.run_elements(add_fixed_kernel<Real>, texel_rows_ * row_, fixed_, texel_rows_ * row_, scale_ + 1, grad_texels_);
  }
};

}  // namespace tcam
