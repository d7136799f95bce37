// The first layer of points on the CPU, also for the voxels of grids that do not separate into maps (formulation.h).
//
// Points are processed in waves of up to 64 blocks of 384. Each point gathers its taps, four texel rows with weights in every
// plane. The rows come from planes projected through the first layer, whose sum is z_1, or from the planes themselves, whose
// samples are multiplied by W_1. The voxel loop then reads the block's rows of z_1 as a grid of (1, points, 1). In backward
// each block writes the gradients of its rows. After the blocks, a task owns some channels of one plane and adds the wave's
// rows to its texels, points in ascending order: no sum needs atomics, and each has one order.
#pragma once
#include "first_weights.h"
#include "wave_taps.h"

namespace tcam {

template <class Real_>
class Points {
 public:
  using Real = Real_;
  using Piece = Wave;

  // The number of blocks of a wave.
  static long blocks(const tcam_problem& problem, bool) {
    const long count = WaveTaps<Real>::round_points(problem);
    return std::min<long>(most_blocks, std::max<long>(1, (count + block_points - 1) / block_points));
  }

  Points(const Mlp<Real>& mlp, Carver& ws)
      : m(mlp),
        p(m.p),
        projected(gathers_projections(p, p.points < 0 ? 1 : p.batch, m.row_bytes(1))),
        samples(matrix_count(p)),
        channels(round_up(p.channels, m.real.columns)),
        pitch(projected ? m.stride : channels),
        weights(m, m.blocks, m.blocks, ws),
        taps(m, m.blocks * block_points, pitch, ws) {
    texels_ = ws.array<Real>(taps.rows() * pitch);
    if (p.extra) extra_ = ws.array<Real>(taps.most * p.extra);
    if (p.layers) {
      z_ = ws.array<Real>(taps.most * m.stride);
      zero_ = ws.array<Real>(m.stride);
    }
    if (!projected) sampled_ = ws.array<Real>(samples * taps.most * channels);
    if (p.reduce == TCAM_PRODUCT) product_ = ws.array<Real>(p.group_count * taps.most * channels);
    if (!m.backward) return;
    if (p.grad_planes || (projected && p.grad_decoder)) grad_texels_ = ws.array<Real>(taps.rows() * pitch);
    if (p.layers) delta_ = ws.array<Real>(taps.most * m.stride);
    if (!projected) grad_sampled_ = ws.array<Real>(samples * taps.most * channels);
    if (p.reduce == TCAM_PRODUCT) grad_product_ = ws.array<Real>(p.group_count * taps.most * channels);
    if (p.grad_extra) grad_extra_ = ws.array<Real>(taps.most * p.extra);
    if (p.grad_points) dots_ = ws.array<Real>(taps.most * taps.taps);
  }

  template <class F>
  void each_piece(F f) {
    for (long begin = 0; begin < taps.count; begin += taps.most) f(Wave{begin, std::min(taps.most, taps.count - begin)});
  }

  long rounds() const { return taps.grid ? static_cast<long>(p.batch) : 1; }  // a grid's objects in turn; all points at once
  void pack(const tcam_inputs& in) {
    if (p.layers) zero(zero_, m.row_bytes(1), 1);
    weights.pack(in);
  }
  void clear_gradients() { weights.clear_gradients(); }
  void write_gradients(const tcam_gradients& to, long object) const { weights.write_gradients(to, object); }

  // Stores the texels of the round's objects as rows, projected or not.
  void begin(const tcam_inputs& in, long round) {
    in_ = &in;
    round_ = round;
    taps.begin(in, round);
    for_texels([&](int q, long slot, Range s, int thread) {
      const Features f = plane_features(in.planes[q], q, slot);
      Real* to = texels_ + taps.texel_row(q, slot) * pitch;
      if (projected) {
        m.real.project(f, s.lo, s.hi, weights.weights(weights.block_of(q)), m.n1, to, pitch, false, m.scratch(thread));
        return;
      }
      const Real* from = static_cast<const Real*>(f.data);
      for (long t = s.lo; t < s.hi; ++t)
        for (long c = 0; c < pitch; ++c) to[t * pitch + c] = c < p.channels ? from[c * taps.texels(q) + t] : Real(0);
    });
  }
  void begin_gradients(const tcam_gradients&) {
    if (grad_texels_) zero(grad_texels_, taps.rows() * pitch * m.real.real_bytes, m.threads);
  }

  Maps maps(const Wave& wave) {
    taps.sort(wave);
    return {z_, zero_, zero_, 0, m.stride, 0, 0, 0, 0, wave.points, 1, m.stride, taps.order(), false};
  }
  Block block(const Wave& wave, long task) const {
    const Range t = chunk(wave.points, m.blocks, task);
    return {0, 1, t.lo, t.hi, 0, 1};
  }
  long first_voxel(const Wave& wave) const { return wave.begin; }

  // Computes z_1 of a block's points or, without layers, writes their features to the output.
  void forward_block(const Wave& wave, const Volume& volume, long task, int thread) {
    const Range t = chunk(wave.points, m.blocks, task);
    taps.place(wave, t);
    if (projected) {
      m.real.gather(texels_, taps.of(0, p.plane_count, t.lo), t.hi - t.lo, weights.bias(), z_ + t.lo * m.stride, m.stride,
                    m.stride);
    } else {
      sample_planes(t);
      if (!p.layers) {
        if (!m.backward) write_features(wave, t, volume);  // on the way back `volume` is their gradient
        return;
      }
      if (p.noise_std != 0) add_noise(wave, t);
      for (long x = t.lo; x < t.hi; ++x) std::memcpy(z_ + x * m.stride, weights.bias(), m.row_bytes(1));
      for (long b = 0; b < plane_blocks(); ++b)
        m.real.project(rows(sample(product_ ? product_ : sampled_, b)), t.lo, t.hi, weights.weights(b), m.n1, z_, m.stride,
                       true, m.scratch(thread));
    }
    if (!p.extra) return;
    const Real* from = static_cast<const Real*>(in_->extra) + first_extra(wave);
    for (long x = t.lo; x < t.hi; ++x)
      std::memcpy(extra_ + x * p.extra, from + taps.place_of(x) * p.extra, static_cast<size_t>(p.extra) * sizeof(Real));
    for (long b = plane_blocks(); b < weights.blocks(); ++b)
      m.real.project(extra_features(extra_, b), t.lo, t.hi, weights.weights(b), m.n1, z_, m.stride, true, m.scratch(thread));
  }

  void begin_backward(const Wave&) {}
  BlockGradients gradients(const Wave& wave, long task) const {
    const Range t = chunk(wave.points, m.blocks, task);
    std::memset(delta_ + t.lo * m.stride, 0, m.row_bytes(t.hi - t.lo));
    return {delta_, nullptr, nullptr, nullptr};
  }
  // Takes the gradient of z_1 or, without layers, of the features. Computes the gradients of the block's samples, extra
  // features and coordinates, and adds to its partial sums of W_1 and b_1.
  void backward_block(const Wave& wave, const Volume& volume, long task, int thread, const tcam_gradients& to) {
    const Range t = chunk(wave.points, m.blocks, task);
    if (p.layers && p.grad_decoder)
      for (long x = t.lo; x < t.hi; ++x) weights.add_bias_gradient(task, delta_ + x * m.stride);
    if (!projected) back_to_samples(wave, t, volume, task, thread);
    if (p.extra) back_to_extra(wave, t, task, thread, to);
    if (p.grad_points) to_points(wave, t, to);
  }
  // Adds the gradients of the wave's samples to the texels.
  void end_backward(const Wave& wave) {
    if (!grad_texels_) return;
    const long slices = (pitch + slice - 1) / slice;
    parallel_for(p.plane_count * slices, m.threads, [&](long task, int) {
      const long q = task / slices, c0 = task % slices * slice;
      const Real* delta = projected ? delta_ : sample(grad_sampled_, matrix_of(p, static_cast<int>(q)));
      m.real.scatter(grad_texels_, taps.of(q, q + 1, 0), wave.points, delta, projected ? m.stride : channels, c0,
                     std::min(c0 + slice, pitch));
    });
  }

  // Computes the gradients of the round's planes and, with projected planes, adds to the partial sums of W_1.
  void end(const tcam_inputs& in, long, const tcam_gradients& to) {
    if (!grad_texels_) return;
    // Objects share the partial sums of W_1, and so may planes, so they are processed one after another.
    for (long slot = 0; slot < taps.objects; ++slot)
      for (int q = 0; q < p.plane_count; ++q) {
        const long block = weights.block_of(q), texels = taps.texels(q);
        Real* out = nullptr;
        if (p.grad_planes) out = const_cast<Real*>(static_cast<const Real*>(plane_features(to.planes[q], q, slot).data));
        const Real* grad = grad_texels_ + taps.texel_row(q, slot) * pitch;
        parallel_for(m.blocks, m.threads, [&](long task, int thread) {
          const Range s = chunk(texels, m.blocks, task);
          if (projected)
            m.real.unproject(grad, pitch, plane_features(in.planes[q], q, slot), s.lo, s.hi,
                             out ? weights.transposed(block) : nullptr, m.n1, out, weights.partial(block, task),
                             m.scratch(thread));
          else
            for (long t = s.lo; t < s.hi; ++t)
              for (long c = 0; c < p.channels; ++c) out[c * texels + t] = grad[t * pitch + c];
        });
      }
  }

 private:
  static constexpr long most_blocks = 64, block_points = 384;
  static constexpr long slice = 32;  // channels of a task in end_backward

  const Mlp<Real>& m;
  const tcam_problem& p;
  const bool projected;
  const long samples, channels, pitch;  // number of matrices of sampled features; their padded channels; reals of a texel row
  FirstWeights<Real> weights;
  WaveTaps<Real> taps;
  const tcam_inputs* in_ = nullptr;  // the round's inputs
  long round_ = 0;
  // texels_, grad_texels_ (all texel rows, pitch). The others have a row for each point of a wave, in the order of WaveTaps:
  // z_, delta_ (n_1 padded); sampled_, grad_sampled_ (samples matrices, channels); product_, grad_product_ (groups, channels):
  // the products of the samples of each group; extra_, grad_extra_ (p.extra); dots_ (taps). zero_ is one row of zeros. Null:
  // not needed.
  Real *extra_ = nullptr, *grad_extra_ = nullptr;
  Real *texels_, *z_ = nullptr, *zero_ = nullptr, *sampled_ = nullptr, *product_ = nullptr;
  Real *grad_texels_ = nullptr, *delta_ = nullptr, *grad_sampled_ = nullptr, *grad_product_ = nullptr, *dots_ = nullptr;

  Real* sample(Real* all, long s) const { return all + s * taps.most * channels; }
  // The taps of sample matrix s from point t on.
  PointTaps sample_taps(long s, long t) const {
    const PlaneRange planes = planes_of_matrix(p, static_cast<int>(s));
    return taps.of(planes.begin, planes.end, t);
  }
  long plane_blocks() const { return p.group_count; }

  Features plane_features(const void* planes, int q, long slot) const {
    const long object = taps.grid ? round_ : slot, texels = taps.texels(q);
    return {static_cast<const Real*>(planes) + object * p.channels * texels, static_cast<long>(p.channels), 1, texels};
  }
  Features rows(const Real* data) const { return {data, static_cast<long>(p.channels), channels, 1}; }
  // The columns of rows (points, p.extra) that a block of W_1 beyond the planes' blocks multiplies.
  Features extra_features(const Real* rows, long block) const {
    return {rows + (block - plane_blocks()) * TCAM_MAX_WIDTH, weights.width(block), static_cast<long>(p.extra), 1};
  }
  long first_extra(const Wave& wave) const { return ((taps.grid ? round_ * taps.count : 0) + wave.begin) * p.extra; }

  // Calls f(plane, object's number in texels_, range of texels, thread) in parallel over all texels of the round.
  template <class F>
  void for_texels(F f) {
    parallel_for(p.plane_count * taps.objects * m.blocks, m.threads, [&](long task, int thread) {
      const int q = static_cast<int>(task / m.blocks / taps.objects);
      f(q, task / m.blocks % taps.objects, chunk(taps.texels(q), m.blocks, task % m.blocks), thread);
    });
  }

  // Gathers the sampled features of points t, and multiplies them where the planes are multiplied.
  void sample_planes(Range t) {
    for (long s = 0; s < samples; ++s)
      m.real.gather(texels_, sample_taps(s, t.lo), t.hi - t.lo, nullptr, sample(sampled_, s) + t.lo * channels, channels,
                    channels);
    for (int g = 0; product_ && g < p.group_count; ++g) {
      const PlaneRange group = planes_of_group(p, g);
      Real* out = sample(product_, g);
      for (long e = t.lo * channels; e < t.hi * channels; ++e) {
        Real x = sample(sampled_, group.begin)[e];
        for (long s = group.begin + 1; s < group.end; ++s) x *= sample(sampled_, s)[e];
        out[e] = x;
      }
    }
  }

  // Adds noise to the features that the planes' blocks of W_1 multiply.
  void add_noise(const Wave& wave, Range range) {
    float noise[TCAM_MAX_PLANES * TCAM_MAX_WIDTH + 64] = {};  // rows are read to their padded ends
    const long c = static_cast<long>(p.channels), features = plane_blocks() * c;
    const Real std = static_cast<Real>(p.noise_std);
    for (long t = range.lo; t < range.hi; ++t) {
      m.real.normals(taps.noise_key(wave, t), features, 0, noise_blocks(features), noise);
      for (long b = 0; b < plane_blocks(); ++b) {
        Real* row = sample(product_ ? product_ : sampled_, b) + t * channels;
        if constexpr (sizeof(Real) == sizeof(float))
          m.real.add_scaled(row, noise + b * c, p.noise_std, channels);  // no product reads beyond c
        else
          for (long e = 0; e < c; ++e) row[e] += std * static_cast<Real>(noise[b * c + e]);
      }
    }
  }

  // Computes the gradients of the sampled features, and adds to the partial sums of W_1's blocks for the planes.
  void back_to_samples(const Wave& wave, Range t, const Volume& volume, long task, int thread) {
    const bool wanted = p.grad_planes || p.grad_points;
    Real* all = grad_product_ ? grad_product_ : grad_sampled_;
    for (long b = 0; p.layers && b < plane_blocks(); ++b) {
      Real* grad = sample(all, b);
      m.real.unproject(delta_, m.stride, rows(sample(product_ ? product_ : sampled_, b)), t.lo, t.hi,
                       wanted ? weights.transposed(b) : nullptr, m.n1, wanted ? grad : nullptr, weights.partial(b, task),
                       m.scratch(thread));
      if (wanted) clear_padding(grad, t);
    }
    if (!p.layers) read_features(wave, t, volume, all);
    for (int g = 0; grad_product_ && wanted && g < p.group_count; ++g) {
      const PlaneRange group = planes_of_group(p, g);
      for (long e = t.lo * channels; e < t.hi * channels; ++e)
        for (long s = group.begin; s < group.end; ++s) {
          Real x = sample(grad_product_, g)[e];
          for (long other = group.begin; other < group.end; ++other)
            if (other != s) x *= sample(sampled_, other)[e];
          sample(grad_sampled_, s)[e] = x;
        }
    }
  }
  // Computes the gradients of the extra features, and adds to the partial sums of W_1's blocks for them.
  void back_to_extra(const Wave& wave, Range t, long task, int thread, const tcam_gradients& to) {
    for (long b = plane_blocks(); b < weights.blocks(); ++b)
      m.real.unproject(delta_, m.stride, extra_features(extra_, b), t.lo, t.hi, grad_extra_ ? weights.transposed(b) : nullptr,
                       m.n1, grad_extra_ ? const_cast<void*>(extra_features(grad_extra_, b).data) : nullptr,
                       weights.partial(b, task), m.scratch(thread));
    Real* gradient = static_cast<Real*>(to.extra) + first_extra(wave);
    for (long x = t.lo; grad_extra_ && x < t.hi; ++x)
      std::memcpy(gradient + taps.place_of(x) * p.extra, grad_extra_ + x * p.extra,
                  static_cast<size_t>(p.extra) * sizeof(Real));
  }
  void clear_padding(Real* rows, Range t) const {
    for (long x = t.lo; x < t.hi; ++x)
      for (long c = p.channels; c < channels; ++c) rows[x * channels + c] = 0;
  }

  // Calls f(element of the output, element of the sample matrices) for each feature of points t. Without layers the output is
  // (points, features), in which one sample matrix follows another.
  template <class F>
  void each_feature(const Wave& wave, Range t, F f) {
    const long matrices = plane_blocks(), c = p.channels;
    for (long x = t.lo; x < t.hi; ++x)
      for (long b = 0; b < matrices; ++b)
        for (long e = 0; e < c; ++e) f((taps.number(wave, x) * matrices + b) * c + e, (b * taps.most + x) * channels + e);
  }
  void write_features(const Wave& wave, Range t, const Volume& out) {
    const Real* from = product_ ? product_ : sampled_;
    each_feature(wave, t, [&](long e, long at) { Elements<Real>::write(out.data, out.dtype, e, from[at]); });
  }
  void read_features(const Wave& wave, Range t, const Volume& out, Real* to) {
    each_feature(wave, t, [&](long e, long at) { to[at] = Elements<Real>::read(out.data, out.dtype, e); });
    for (long b = 0; b < plane_blocks(); ++b) clear_padding(sample(to, b), t);
  }

  // Computes the gradients of the coordinates. dots_ has, for each tap, the product of its texel row with the gradient of the
  // sample; the derivatives of the taps' weights by the coordinates do the rest.
  void to_points(const Wave& wave, Range range, const tcam_gradients& to) {
    const long n = range.hi - range.lo;
    Real* dots = dots_ + range.lo * taps.taps;
    if (projected) {
      PointTaps all = taps.of(0, p.plane_count, range.lo);
      all.weights = nullptr;
      m.real.dot(texels_, all, n, delta_ + range.lo * m.stride, m.stride, m.stride, dots);
    } else {
      for (long s = 0; s < samples; ++s)
        m.real.dot(texels_, sample_taps(s, range.lo), n, sample(grad_sampled_, s) + range.lo * channels, channels, channels,
                   dots + 4 * planes_of_matrix(p, static_cast<int>(s)).begin);
    }
    Real* out = static_cast<Real*>(to.points) + wave.begin * p.axes;
    for (long t = range.lo; t < range.hi; ++t) {
      Real sum[TCAM_MAX_AXES] = {};
      for (int q = 0; q < p.plane_count; ++q)
        for (int x = 0; x < 4; ++x) {
          const long e = t * taps.taps + 4 * q + x;
          sum[p.planes[q].row_axis] += dots_[e] * taps.by_row(e);
          sum[p.planes[q].column_axis] += dots_[e] * taps.by_column(e);
        }
      for (int a = 0; a < p.axes; ++a) out[taps.place_of(t) * p.axes + a] = sum[a];
    }
  }
};

}  // namespace tcam
