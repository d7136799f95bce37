// decode_points, sample_points, and grids that do not separate (the product of the planes), on CUDA, layer by layer over waves
// of points.
//
// A wave gathers its points' texel rows, of the planes projected through the first layer (their sum is that layer's output) or
// of the planes themselves (then the first layer is a product), and layers.cuh does the rest. On the way back every point adds
// to its texels in integers: a wave's gradients are scaled so that the largest has 45 bits, and a sum of integers is the same
// in any order. So results do not depend on the order of the atomic additions. A gradient that is not finite makes all of the
// wave's NaN.
#pragma once
#include "../formulation.h"
#include "layers.cuh"
#include "points_kernels.cuh"
#include "scale.cuh"

namespace tcam {

template <class Real>
class PointLayers : public Layers<Real> {
 protected:
  using Base = Layers<Real>;
  using Base::blocks, Base::channel_threads, Base::check, Base::clear, Base::columns, Base::rows, Base::texels, Base::width;
  using Base::delta_, Base::most_, Base::n_, Base::p, Base::region_size_, Base::status_, Base::stream_, Base::weights_,
      Base::z_;

 public:
  PointLayers(const tcam_problem& problem, bool backward, void* workspace, cudaStream_t stream)
      : PointLayers(problem, backward, workspace, stream, 0, 0) {}

  cudaError_t forward(const tcam_inputs& in, void* out, const tcam_objective* objective, double* losses) {
    this->set_layers(in);
    if (objective) clear(losses, p.batch * sizeof(double));
    for (int64_t round = 0; round < rounds() && !status_; ++round) {
      load_texels(in, round);
      this->for_each_region([&](const Region& region) {
        first_layer(in, round, region);
        if (p.layers)
          decode(region, layout(out, objective, round), objective, losses + round);
        else
          features(out, region, false);
      });
    }
    return status_;
  }

  cudaError_t backward(const tcam_inputs& in, const void* out, const tcam_objective* objective, double* losses,
                       const tcam_gradients& to) {
    const bool per_object = objective && objective->per_object;
    this->set_layers(in);
    if (objective) clear(losses, p.batch * sizeof(double));
    this->look_at(out, objective);
    for (int64_t round = 0; round < rounds() && !status_; ++round) {
      if (round == 0 || per_object) clear(this->cleared_, this->cleared_bytes_);
      load_texels(in, round);
      if (grad_texels_) {
        clear(grad_texels_, texel_rows_ * row_ * static_cast<int64_t>(sizeof(Real)));
        clear(fixed_, texel_rows_ * row_ * 8);
      }
      this->for_each_region([&](const Region& region) {
        first_layer(in, round, region);
        if (p.layers) decode_back(region, layout(const_cast<void*>(out), objective, round), objective, losses + round);
        first_layer_back(in, round, const_cast<void*>(out), region, to);
        if (p.grad_points) to_points(in, round, region, to);
        if (grad_texels_) scatter(region);
      });
      if (grad_texels_) to_planes(in, round, to);
      if (p.layers && p.grad_decoder && (per_object || round == rounds() - 1)) {
        this->place_gradients(to, per_object ? round : 0);
        for (int b = 0, column = 0; b < first_blocks(); column += block_width(b), ++b)
          this->combine(
              {this->first_partials_[b], first_splits(), width(1) * static_cast<int64_t>(block_width(b)), block_width(b)},
              width(1), block_width(b), nullptr, this->grad_weight_[1] + column, p.width[0]);
        if (this->grad_bias_[1])
          this->combine({this->first_bias_partials_, this->bias_splits(), width(1), width(1)}, 1, width(1), nullptr,
                        this->grad_bias_[1], width(1));
        this->write_gradients();
      }
    }
    return status_;
  }

 protected:
  // With `more` bytes a point, in waves of up to `voxels`: the layers above the first are another's, from z_[1] to delta_[1].
  PointLayers(const tcam_problem& problem, bool backward, void* workspace, cudaStream_t stream, int64_t more, int64_t voxels)
      : Base(problem, stream), grid_(p.points < 0), held_(grid_ ? 1 : p.batch) {
    n_[2] = grid_ ? n_[0] * n_[1] * n_[2] : p.points;
    n_[0] = n_[1] = 1;
    projected_ = gathers_projections(p, held_, width(1) * static_cast<int64_t>(sizeof(Real)));
    samples_ = p.reduce == TCAM_SUM ? 1 : p.plane_count;
    row_ = projected_ ? width(1) : static_cast<int>(p.channels);
    const int64_t c = p.channels;
    int64_t each = p.plane_count * static_cast<int64_t>(sizeof(Corners<Real>));
    if (!projected_) each += (samples_ + 1) * c * static_cast<int64_t>(sizeof(Real)) * (backward ? 2 : 1);
    if (more)
      this->choose_region_of(each + more, voxels);
    else
      this->choose_region(backward, each);
    Carver ws(workspace);
    auto reals = [&](int64_t count) { return Base::reals(ws, count); };
    for (int q = 0; q < p.plane_count; ++q) {
      base_[q] = texel_rows_;
      texel_rows_ += held_ * texels(q);
    }
    texel_values_ = reals(texel_rows_ * row_);
    corners_ = reinterpret_cast<Corners<Real>*>(ws.take(most_ * p.plane_count * static_cast<int64_t>(sizeof(Corners<Real>))));
    if (!projected_) sampled_ = reals(samples_ * most_ * c);
    if (p.reduce == TCAM_PRODUCT) product_ = reals(most_ * c);
    if (more) {
      z_[1] = reals(most_ * width(1));
      if (backward) delta_[1] = reals(most_ * width(1));
    } else {
      this->carve_layers(ws, backward);
    }
    if (backward) {
      if (!projected_) grad_sampled_ = reals(samples_ * most_ * c);
      if (p.reduce == TCAM_PRODUCT) grad_product_ = reals(most_ * c);
      if (wants_texels()) {
        grad_texels_ = reals(texel_rows_ * row_);
        fixed_ = reinterpret_cast<unsigned long long*>(ws.take(texel_rows_ * row_ * 8));
        largest_ = reinterpret_cast<float*>(ws.take(scale_blocks * 4));
        scale_ = reinterpret_cast<float*>(ws.take(2 * 4));
      }
      if (p.grad_decoder) {
        this->partials_begin_ = ws.used();
        for (int b = 0; b < first_blocks(); ++b) this->first_partials_[b] = reals(first_splits() * width(1) * block_width(b));
        this->first_bias_partials_ = reals(this->bias_splits() * width(1));
        if (!more) this->carve_partials(ws);
        this->end_partials(ws, workspace);
      }
    }
    this->bytes_ = ws.used();
  }

  int64_t places() const override { return grid_ ? p.batch * n_[2] : n_[2]; }

  // From z_1 of a wave to its output or its losses; and from these back to delta_1.
  virtual void decode(const Region& region, const typename Base::Layout& out, const tcam_objective* objective, double* loss) {
    this->hidden_layers(region.voxels());
    this->last_layer(region, out, objective, loss, nullptr);
  }
  virtual void decode_back(const Region& region, const typename Base::Layout& out, const tcam_objective* objective,
                           double* loss) {
    this->hidden_layers(region.voxels());
    this->last_layer(region, out, objective, loss, delta_[p.layers & 1]);
    this->back_to_first(region.voxels());
  }

 private:
  const bool grid_;
  const int64_t held_;  // objects whose texels are held at once
  bool projected_ = false;
  int samples_ = 0, row_ = 0;  // matrices of sampled features; numbers a texel row
  int64_t texel_rows_ = 0, base_[TCAM_MAX_PLANES] = {};
  Real *texel_values_ = nullptr, *sampled_ = nullptr, *product_ = nullptr, *grad_texels_ = nullptr, *grad_sampled_ = nullptr,
       *grad_product_ = nullptr;
  Corners<Real>* corners_ = nullptr;
  unsigned long long* fixed_ = nullptr;
  float *largest_ = nullptr, *scale_ = nullptr;

  bool wants_texels() const { return p.grad_planes || (projected_ && p.grad_decoder); }
  int64_t rounds() const { return grid_ ? p.batch : 1; }
  int plane_blocks() const { return p.reduce == TCAM_CONCAT ? p.plane_count : 1; }
  int first_blocks() const { return p.layers ? plane_blocks() + (p.extra ? 1 : 0) : 0; }
  int block_width(int b) const { return static_cast<int>(b < plane_blocks() ? p.channels : p.extra); }
  int block_of(int q) const { return p.reduce == TCAM_CONCAT ? q : 0; }
  const Real* block_weight(int b) const { return weights_[1] + b * p.channels; }
  int64_t first_splits() const { return this->splits() > texel_splits ? this->splits() : texel_splits; }
  const Real* plane_of(const void* const* planes, int q, int64_t object) const {
    return static_cast<const Real*>(planes[q]) + object * p.channels * texels(q);
  }
  unsigned element_blocks(int64_t elements) const { return blocks(ceil_div(elements, threads)); }
  Real* sample(Real* all, int s) const { return all + s * most_ * p.channels; }

  PointPlanes<Real> planes(const tcam_inputs& in, int64_t round) const {
    PointPlanes<Real> all = {};
    all.count = p.plane_count;
    all.axes = p.axes;
    for (int q = 0; q < p.plane_count; ++q) {
      all.row_axis[q] = p.planes[q].row_axis, all.column_axis[q] = p.planes[q].column_axis;
      all.rows[q] = rows(q), all.columns[q] = columns(q), all.base[q] = base_[q];
    }
    all.align_corners = p.align_corners != 0, all.corners = p.corners != 0;
    all.padding = p.padding;
    all.scale = static_cast<Real>(p.plane_scale);
    all.points = grid_ ? nullptr : static_cast<const Real*>(in.points);
    all.objects = in.objects;
    all.each = grid_ ? 1 : p.points / p.batch, all.held = held_;
    all.bounds = in.bounds ? in.bounds + round * 6 : nullptr;
    all.box = grid_box(p);
    return all;
  }
  typename Base::Layout layout(void* out, const tcam_objective* objective, int64_t round) const {
    const int64_t n_out = width(p.layers);
    if (!grid_) return {out, 1, n_out};
    const int dtype = objective ? objective->target_dtype : p.out_dtype;
    return {static_cast<char*>(out) + round * n_out * n_[2] * dtype_bytes(dtype), n_[2], 1};
  }

  void load_texels(const tcam_inputs& in, int64_t round) {
    for (int q = 0; q < p.plane_count; ++q)
      for (int64_t slot = 0; slot < held_; ++slot) {
        const Real* plane = plane_of(in.planes, q, grid_ ? round : slot);
        Real* to = texel_values_ + (base_[q] + slot * texels(q)) * row_;
        if (projected_)
          check(gemm<Scalars<Real, 64>>(texels(q), row_, p.channels, 0, Transposed<Real>{plane, texels(q)},
                                        Transposed<Real>{block_weight(block_of(q)), p.width[0]},
                                        WriteRows<Real>{to, row_, nullptr}, stream_));
        else
          check(
              launch(to_rows_kernel<Real>, element_blocks(texels(q) * row_), threads, 0, stream_, plane, texels(q), row_, to));
      }
  }

  void gather(int q0, int q1, int64_t count, const Real* bias, Real* out) {
    check(launch(gather_points_kernel<Real>, blocks(ceil_div(count, warps)), threads, 0, stream_, corners_, p.plane_count, q0,
                 q1, count, texel_values_, row_, bias, out));
  }

  // z_1 of the points or, without layers, their features.
  void first_layer(const tcam_inputs& in, int64_t round, const Region& region) {
    const int64_t count = region.voxels();
    const int n1 = p.layers ? width(1) : 0;
    check(launch(place_kernel<Real>, element_blocks(count * p.plane_count), threads, 0, stream_, planes(in, round), region.k0,
                 count, corners_));
    if (projected_) {
      gather(0, p.plane_count, count, this->biases_[1], z_[1]);
    } else {
      for (int s = 0; s < samples_; ++s)
        gather(samples_ == 1 ? 0 : s, samples_ == 1 ? p.plane_count : s + 1, count, nullptr, sample(sampled_, s));
      if (product_)
        check(launch(product_kernel<Real>, element_blocks(count * p.channels), threads, 0, stream_, sampled_, samples_,
                     most_ * p.channels, count * p.channels, product_));
      if (!p.layers) return;
      if (p.noise_std != 0)
        check(launch(add_noise_kernel<Real>, blocks(ceil_div(count, warps)), threads, 0, stream_,
                     PointNoise<Real>{planes(in, round), p.noise_seed, static_cast<Real>(p.noise_std), round, plane_blocks(),
                                      static_cast<int>(p.channels), most_ * p.channels, product_ ? product_ : sampled_},
                     region.k0, count));
      for (int b = 0; b < plane_blocks(); ++b) {
        const Rows<Real> features = {product_ ? product_ : sample(sampled_, b), p.channels};
        const Transposed<Real> weight = {block_weight(b), p.width[0]};
        check(b ? this->product(count, n1, p.channels, 0, features, weight, AddRows<Real>{z_[1], n1})
                : this->product(count, n1, p.channels, 0, features, weight, WriteRows<Real>{z_[1], n1, this->biases_[1]}));
      }
    }
    if (p.extra)
      check(this->product(count, n1, p.extra, 0, extra(in.extra, round, region),
                          Transposed<Real>{block_weight(plane_blocks()), p.width[0]}, AddRows<Real>{z_[1], n1}));
  }
  int64_t first_extra(int64_t round, const Region& region) const { return ((grid_ ? round * n_[2] : 0) + region.k0) * p.extra; }
  Rows<Real> extra(const void* all, int64_t round, const Region& region) const {
    return {static_cast<const Real*>(all) + first_extra(round, region), p.extra};
  }

  void features(void* out, const Region& region, bool read) {
    Real* arrays = read ? (grad_product_ ? grad_product_ : grad_sampled_) : (product_ ? product_ : sampled_);
    const int64_t each = plane_blocks() * p.channels * dtype_bytes(p.out_dtype);
    check(launch(features_kernel<Real>, element_blocks(region.voxels() * plane_blocks() * p.channels), threads, 0, stream_,
                 arrays, plane_blocks(), most_ * p.channels, static_cast<int>(p.channels),
                 static_cast<int64_t>(region.voxels()), static_cast<char*>(out) + region.k0 * each, p.out_dtype, read));
  }

  // dW of a block of the first layer from delta_1 and what the block multiplied.
  template <class Operand>
  void weight_gradient(int b, int64_t count, Operand operand) {
    check(this->product(width(1), block_width(b), count, voxel_chunk, Transposed<Real>{delta_[1], width(1)}, operand,
                        AddPartial<Real>{this->first_partials_[b], width(1), block_width(b)}));
  }

  void first_layer_back(const tcam_inputs& in, int64_t round, void* out, const Region& region, const tcam_gradients& to) {
    const int64_t count = region.voxels();
    const int n1 = p.layers ? width(1) : 0;
    if (p.layers && p.grad_decoder)
      check(launch(add_column_sums_kernel<Real>, static_cast<unsigned>(ceil_div(count, bias_chunk)), channel_threads(n1), 0,
                   stream_, delta_[1], count, n1, bias_chunk, this->first_bias_partials_));
    if (!projected_) {
      Real* grad = grad_product_ ? grad_product_ : grad_sampled_;
      for (int b = 0; p.layers && b < plane_blocks(); ++b) {
        if (p.grad_decoder) weight_gradient(b, count, Rows<Real>{product_ ? product_ : sample(sampled_, b), p.channels});
        if (p.grad_planes || p.grad_points)
          check(this->product(count, static_cast<int>(p.channels), n1, 0, Rows<Real>{delta_[1], n1},
                              Rows<Real>{block_weight(b), p.width[0]}, WriteRows<Real>{sample(grad, b), p.channels, nullptr}));
      }
      if (!p.layers) features(out, region, true);
      if (grad_product_ && (p.grad_planes || p.grad_points))
        check(launch(product_back_kernel<Real>, element_blocks(count * p.channels), threads, 0, stream_, sampled_,
                     grad_product_, samples_, most_ * p.channels, count * p.channels, grad_sampled_));
    }
    if (!p.extra) return;
    if (p.grad_decoder) weight_gradient(plane_blocks(), count, extra(in.extra, round, region));
    if (p.grad_extra)
      check(this->product(count, static_cast<int>(p.extra), n1, 0, Rows<Real>{delta_[1], n1},
                          Rows<Real>{block_weight(plane_blocks()), p.width[0]},
                          WriteRows<Real>{static_cast<Real*>(to.extra) + first_extra(round, region), p.extra, nullptr}));
  }

  void to_points(const tcam_inputs& in, int64_t round, const Region& region, const tcam_gradients& to) {
    const PointGradient<Real> g = {planes(in, round),
                                   projected_ ? delta_[1] : grad_sampled_,
                                   samples_ == 1 || projected_ ? 0 : most_ * p.channels,
                                   texel_values_,
                                   row_,
                                   region.k0,
                                   region.voxels(),
                                   static_cast<Real*>(to.points)};
    check(launch(points_gradient_kernel<Real>, blocks(ceil_div(region.voxels(), warps)), threads, 0, stream_, g));
  }

  void scatter(const Region& region) {
    const int64_t count = region.voxels();
    const int dtype = sizeof(Real) == 8 ? TCAM_F64 : TCAM_F32;
    const int parts = projected_ ? 1 : samples_;  // a largest number for each of them would gain nothing
    int read = 0;
    for (int s = 0; s < parts; ++s) {
      const Real* delta = projected_ ? delta_[1] : sample(grad_sampled_, s);
      const int64_t values = count * row_;
      const int most = scale_blocks / parts;
      const unsigned grid =
          static_cast<unsigned>(values < static_cast<int64_t>(most) * threads ? ceil_div(values, threads) : most);
      check(launch(largest_kernel, grid, threads, reduce_bytes, stream_, delta, dtype, values, largest_ + read));
      read += static_cast<int>(grid);
    }
    check(launch(scale_kernel, 1, 1, 0, stream_, largest_, read, 0.f, 1.f, fixed_exponent, NAN, scale_));
    for (int s = 0; s < parts; ++s)
      check(launch(scatter_points_kernel<Real>, blocks(ceil_div(count, warps)), threads, 0, stream_, corners_, p.plane_count,
                   parts == 1 ? 0 : s, parts == 1 ? p.plane_count : s + 1, count,
                   projected_ ? delta_[1] : sample(grad_sampled_, s), row_, scale_, fixed_));
    check(launch(add_fixed_kernel<Real>, element_blocks(texel_rows_ * row_), threads, 0, stream_, fixed_, texel_rows_ * row_,
                 scale_ + 1, grad_texels_));
  }

  void to_planes(const tcam_inputs& in, int64_t round, const tcam_gradients& to) {
    for (int q = 0; q < p.plane_count; ++q)
      for (int64_t slot = 0; slot < held_; ++slot) {
        const int64_t object = grid_ ? round : slot;
        const int b = block_of(q);
        const Real* grad = grad_texels_ + (base_[q] + slot * texels(q)) * row_;
        Real* out = p.grad_planes ? const_cast<Real*>(plane_of(to.planes, q, object)) : nullptr;
        if (!projected_) {
          check(launch(from_rows_kernel<Real>, element_blocks(texels(q) * row_), threads, 0, stream_, grad, texels(q), row_,
                       out));
          continue;
        }
        if (p.grad_decoder)
          check(gemm<Scalars<Real, 64>>(row_, static_cast<int>(p.channels), texels(q), this->texel_chunk(q),
                                        Transposed<Real>{grad, row_},
                                        Transposed<Real>{plane_of(in.planes, q, object), texels(q)},
                                        AddPartial<Real>{this->first_partials_[b], row_, p.channels}, stream_));
        if (out)
          check(gemm<Scalars<Real, 64>>(texels(q), static_cast<int>(p.channels), row_, 0, Rows<Real>{grad, row_},
                                        Rows<Real>{block_weight(b), p.width[0]}, WriteTransposed<Real>{out, texels(q)},
                                        stream_));
      }
  }
};

}  // namespace tcam
