// decode_points, sample_points, and grids that do not separate (the product of the planes), on CUDA, layer by layer over waves
// of points.
//
// A wave gathers its points' texel rows, of the planes projected through the first layer (their sum is that layer's output) or
// of the planes themselves (then the first layer is a product), and layers.h does the rest. On the way back every point adds to
// its texels in integers: a wave's gradients are scaled so that the largest has 45 bits, and a sum of integers is the same in
// any order. So results do not depend on the order of the atomic additions. A gradient that is not finite makes all of the
// wave's NaN.
#pragma once
#include "layers.h"
#include "scale.h"

namespace tcam {

constexpr int fixed_exponent = 45;  // of the largest contribution: 2^16 of them fit 62 bits

// Where a point reads a plane: rows of texels, in rows, and their weights.
template <class Real>
struct Corners {
  int64_t row[4];
  Real weight[4];
};

template <class Real>
struct PointPlanes {
  int count, axes;
  int row_axis[TCAM_MAX_PLANES], column_axis[TCAM_MAX_PLANES];
  int64_t rows[TCAM_MAX_PLANES], columns[TCAM_MAX_PLANES], base[TCAM_MAX_PLANES];  // base: the plane's first row of texels
  bool align_corners, corners;
  int padding;
  Real scale;
  const Real* points;      // (all points, axes); of a grid: null
  const int64_t* objects;  // null: `each` points an object
  int64_t each, held;      // held: objects whose texels there are
  const double* bounds;    // of a grid's object; null: none
  int64_t size[3], lo[3], box[3];

  TCAM_HD Tap<Real> tap(int axis, int64_t texels, int64_t point) const {
    const Axis a = {static_cast<int>(texels), align_corners, padding};
    if (points) return coordinate_tap<Real>(a, points[point * axes + axis]);
    const int64_t at[3] = {point / (box[1] * box[2]), point / box[2] % box[1], point % box[2]};
    const Tap<double> t = voxel_tap(a, lo[axis] + at[axis], size[axis], corners, bounds ? bounds + 2 * axis : nullptr);
    return {t.lo, t.hi, static_cast<Real>(t.w_lo), static_cast<Real>(t.w_hi), Real(0), Real(0)};
  }
  // The object whose texels a point reads; -1: there is none such.
  TCAM_HD int64_t object(int64_t point) const {
    if (!points) return 0;
    const int64_t o = objects ? objects[point] : point / each;
    return o >= 0 && o < held ? o : -1;
  }
};

// corners (points, planes) of the wave's points; a point without an object gets NaN.
template <class Real>
__global__ void __launch_bounds__(threads)
    place_kernel(PointPlanes<Real> p, int64_t first, int64_t count, Corners<Real>* corners) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count * p.count;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t point = first + e / p.count, object = p.object(point);
    const int q = static_cast<int>(e % p.count);
    const Tap<Real> r = p.tap(p.row_axis[q], p.rows[q], point), c = p.tap(p.column_axis[q], p.columns[q], point);
    const int64_t begin = p.base[q] + (object < 0 ? 0 : object) * p.rows[q] * p.columns[q];
    const Real s = object < 0 ? static_cast<Real>(NAN) : p.scale;
    corners[e] = {{begin + r.lo * p.columns[q] + c.lo, begin + r.lo * p.columns[q] + c.hi, begin + r.hi * p.columns[q] + c.lo,
                   begin + r.hi * p.columns[q] + c.hi},
                  {r.w_lo * c.w_lo * s, r.w_lo * c.w_hi * s, r.w_hi * c.w_lo * s, r.w_hi * c.w_hi * s}};
  }
}

// out (points, n) = bias (null: 0) + the sum of the texels (rows, n) of planes [q0, q1). A warp takes a point.
template <class Real>
__global__ void __launch_bounds__(threads)
    gather_points_kernel(const Corners<Real>* corners, int planes, int q0, int q1, int64_t count, const Real* texels, int n,
                         const Real* bias, Real* out) {
  const int lane = threadIdx.x % 32;
  for (int64_t t = blockIdx.x * static_cast<int64_t>(warps) + threadIdx.x / 32; t < count;
       t += static_cast<int64_t>(gridDim.x) * warps)
    for (int c = lane; c < n; c += 32) {
      Real sum = bias ? bias[c] : Real(0);
      for (int q = q0; q < q1; ++q) {
        const Corners<Real>& at = corners[t * planes + q];
#pragma unroll
        for (int x = 0; x < 4; ++x) sum += at.weight[x] * texels[at.row[x] * n + c];
      }
      out[t * n + c] = sum;
    }
}

// Adds delta (points, n) to the texels of planes [q0, q1), in units of 1/scale.
template <class Real>
__global__ void __launch_bounds__(threads)
    scatter_points_kernel(const Corners<Real>* corners, int planes, int q0, int q1, int64_t count, const Real* delta, int n,
                          const float* scale, unsigned long long* fixed) {
  const int lane = threadIdx.x % 32;
  const Real s = static_cast<Real>(*scale);
  for (int64_t t = blockIdx.x * static_cast<int64_t>(warps) + threadIdx.x / 32; t < count;
       t += static_cast<int64_t>(gridDim.x) * warps)
    for (int q = q0; q < q1; ++q) {
      const Corners<Real>& at = corners[t * planes + q];
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const Real w = at.weight[x] * s;
        if (!(w != 0) || at.weight[x] != at.weight[x]) continue;  // outside, exactly on a texel, or of no object
        for (int c = lane; c < n; c += 32)
          atomicAdd(&fixed[at.row[x] * n + c],
                    static_cast<unsigned long long>(llrint(static_cast<double>(w * delta[t * n + c]))));
      }
    }
}

// sums += fixed * *unit, and fixed becomes 0.
template <class Real>
__global__ void __launch_bounds__(threads)
    add_fixed_kernel(unsigned long long* fixed, int64_t count, const float* unit, Real* sums) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    sums[e] += static_cast<Real>(static_cast<double>(static_cast<long long>(fixed[e])) * static_cast<double>(*unit));
    fixed[e] = 0;
  }
}

// Gradients of the coordinates: what the samples change by when the weights of their taps do. delta[b] (points, n) belongs to
// plane b, or to all where there is one. A warp takes a point.
template <class Real>
struct PointGradient {
  PointPlanes<Real> planes;
  const Real* delta;
  int64_t delta_step;  // between the planes' deltas; 0: one for all
  const Real* texels;
  int n;
  int64_t first, count;
  Real* out;  // (all points, axes)
};
template <class Real>
__global__ void __launch_bounds__(threads) points_gradient_kernel(PointGradient<Real> g) {
  const PointPlanes<Real>& p = g.planes;
  const int lane = threadIdx.x % 32;
  for (int64_t t = blockIdx.x * static_cast<int64_t>(warps) + threadIdx.x / 32; t < g.count;
       t += static_cast<int64_t>(gridDim.x) * warps) {
    const int64_t point = g.first + t, object = p.object(point);
    Real sum[TCAM_MAX_AXES] = {};
    for (int q = 0; q < p.count && object >= 0; ++q) {
      const Tap<Real> r = p.tap(p.row_axis[q], p.rows[q], point), c = p.tap(p.column_axis[q], p.columns[q], point);
      const Real* from = g.texels + (p.base[q] + object * p.rows[q] * p.columns[q]) * g.n;
      const Real* delta = g.delta + q * g.delta_step + t * g.n;
      Real by_row = 0, by_column = 0;
      for (int x = lane; x < g.n; x += 32) {
        const Real lo_lo = from[(r.lo * p.columns[q] + c.lo) * g.n + x], lo_hi = from[(r.lo * p.columns[q] + c.hi) * g.n + x],
                   hi_lo = from[(r.hi * p.columns[q] + c.lo) * g.n + x], hi_hi = from[(r.hi * p.columns[q] + c.hi) * g.n + x];
        by_row += delta[x] * (r.d_lo * (c.w_lo * lo_lo + c.w_hi * lo_hi) + r.d_hi * (c.w_lo * hi_lo + c.w_hi * hi_hi));
        by_column += delta[x] * (c.d_lo * (r.w_lo * lo_lo + r.w_hi * hi_lo) + c.d_hi * (r.w_lo * lo_hi + r.w_hi * hi_hi));
      }
#pragma unroll
      for (int a = 0; a < TCAM_MAX_AXES; ++a) {
        if (a == p.row_axis[q]) sum[a] += by_row * p.scale;
        if (a == p.column_axis[q]) sum[a] += by_column * p.scale;
      }
    }
#pragma unroll
    for (int a = 0; a < TCAM_MAX_AXES; ++a) {
      for (int other = 16; other; other /= 2) sum[a] += __shfl_xor_sync(0xffffffffu, sum[a], other);
      if (lane == 0 && a < p.axes) g.out[point * p.axes + a] = sum[a];
    }
  }
}

// out = the product of `planes` arrays of `count`, `step` apart; back: grads[s] = grad times the others.
template <class Real>
__global__ void __launch_bounds__(threads)
    product_kernel(const Real* samples, int planes, int64_t step, int64_t count, Real* out) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    Real x = samples[e];
    for (int s = 1; s < planes; ++s) x *= samples[s * step + e];
    out[e] = x;
  }
}
template <class Real>
__global__ void __launch_bounds__(threads)
    product_back_kernel(const Real* samples, const Real* grad, int planes, int64_t step, int64_t count, Real* grads) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count;
       e += static_cast<int64_t>(gridDim.x) * threads)
    for (int s = 0; s < planes; ++s) {
      Real x = grad[e];
      for (int other = 0; other < planes; ++other)
        if (other != s) x *= samples[other * step + e];
      grads[s * step + e] = x;
    }
}

// (n, texels) to (texels, n), and back.
template <class Real>
__global__ void __launch_bounds__(threads) to_rows_kernel(const Real* plane, int64_t texels, int n, Real* rows) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < texels * n;
       e += static_cast<int64_t>(gridDim.x) * threads)
    rows[e] = plane[e % n * texels + e / n];
}
template <class Real>
__global__ void __launch_bounds__(threads) from_rows_kernel(const Real* rows, int64_t texels, int n, Real* plane) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < texels * n;
       e += static_cast<int64_t>(gridDim.x) * threads)
    plane[e] = rows[e % texels * n + e / texels];
}

// (points, matrices n) of a dtype from or to `matrices` arrays (points, n), `step` apart: sample_points' result and its
// gradient.
template <class Real>
__global__ void __launch_bounds__(threads)
    features_kernel(Real* arrays, int matrices, int64_t step, int n, int64_t count, void* out, int dtype, bool read) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count * matrices * n;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    Real& x = arrays[e / n % matrices * step + e / n / matrices * n + e % n];
    if (read)
      x = Elements<Real>::read(out, dtype, e);
    else
      Elements<Real>::write(out, dtype, e, x);
  }
}

template <class Real>
struct AddRows {
  Real* out;
  int64_t pitch;
  TCAM_DEVICE void operator()(int, int64_t r, int c, Real sum) const { out[r * pitch + c] += sum; }
};
template <class Real>
__global__ void __launch_bounds__(threads) fill_rows_kernel(const Real* bias, int64_t count, int n, Real* out) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count * n;
       e += static_cast<int64_t>(gridDim.x) * threads)
    out[e] = bias ? bias[e % n] : Real(0);
}

template <class Real>
class PointLayers : public Layers<Real> {
  using Base = Layers<Real>;
  using Base::blocks, Base::channel_threads, Base::check, Base::clear, Base::columns, Base::rows, Base::texels, Base::width;
  using Base::delta_, Base::most_, Base::n_, Base::p, Base::region_size_, Base::status_, Base::stream_, Base::weights_,
      Base::z_;

 public:
  PointLayers(const tcam_problem& problem, bool backward, void* workspace, cudaStream_t stream)
      : Base(problem, stream), grid_(p.points < 0), held_(grid_ ? 1 : p.batch) {
    n_[2] = grid_ ? n_[0] * n_[1] * n_[2] : p.points;
    n_[0] = n_[1] = 1;
    projected_ = choose_projected();
    samples_ = p.reduce == TCAM_SUM ? 1 : p.plane_count;
    row_ = projected_ ? width(1) : static_cast<int>(p.channels);
    const int64_t c = p.channels;
    int64_t each = p.plane_count * static_cast<int64_t>(sizeof(Corners<Real>));
    if (!projected_) each += (samples_ + 1) * c * static_cast<int64_t>(sizeof(Real)) * (backward ? 2 : 1);
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
    this->carve_layers(ws, backward);
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
        const int64_t begin = ws.used();
        for (int b = 0; b < first_blocks(); ++b) first_partials_[b] = reals(first_splits() * width(1) * block_width(b));
        first_bias_partials_ = reals(this->bias_splits() * width(1));
        this->carve_partials(ws);
        this->end_partials(ws, workspace, begin);
      }
    }
    this->bytes_ = ws.used();
  }

  cudaError_t forward(const tcam_inputs& in, void* out, const tcam_objective* objective, double* losses) {
    this->set_layers(in);
    if (objective) clear(losses, p.batch * sizeof(double));
    for (int64_t round = 0; round < rounds() && !status_; ++round) {
      load_texels(in, round);
      this->for_each_region([&](const Region& region) {
        first_layer(in, round, region);
        if (p.layers) {
          this->hidden_layers(region.voxels());
          this->last_layer(region, layout(out, objective, round), objective, losses + round, nullptr);
        } else {
          features(out, region, false);
        }
      });
    }
    return status_;
  }

  cudaError_t backward(const tcam_inputs& in, const void* out, const tcam_objective* objective, double* losses,
                       const tcam_gradients& to) {
    const bool per_object = objective && objective->per_object;
    this->set_layers(in);
    if (objective) clear(losses, p.batch * sizeof(double));
    for (int64_t round = 0; round < rounds() && !status_; ++round) {
      if (round == 0 || per_object) clear(this->cleared_, this->cleared_bytes_);
      load_texels(in, round);
      if (grad_texels_) {
        clear(grad_texels_, texel_rows_ * row_ * static_cast<int64_t>(sizeof(Real)));
        clear(fixed_, texel_rows_ * row_ * 8);
      }
      this->for_each_region([&](const Region& region) {
        first_layer(in, round, region);
        if (p.layers) {
          this->hidden_layers(region.voxels());
          this->last_layer(region, layout(const_cast<void*>(out), objective, round), objective, losses + round,
                           delta_[p.layers & 1]);
          this->back_to_first(region.voxels());
        }
        first_layer_back(in, const_cast<void*>(out), region, to);
        if (p.grad_points) to_points(in, round, region, to);
        if (grad_texels_) scatter(region);
      });
      if (grad_texels_) to_planes(in, round, to);
      if (p.layers && p.grad_decoder && (per_object || round == rounds() - 1)) {
        this->place_gradients(to, per_object ? round : 0);
        for (int b = 0, column = 0; b < first_blocks(); column += block_width(b), ++b)
          this->combine({first_partials_[b], first_splits(), width(1) * static_cast<int64_t>(block_width(b)), block_width(b)},
                        width(1), block_width(b), nullptr, this->grad_weight_[1] + column, p.width[0]);
        if (this->grad_bias_[1])
          this->combine({first_bias_partials_, this->bias_splits(), width(1), width(1)}, 1, width(1), nullptr,
                        this->grad_bias_[1], width(1));
        this->write_gradients();
      }
    }
    return status_;
  }

 private:
  const bool grid_;
  const int64_t held_;  // objects whose texels are held at once
  bool projected_ = false;
  int samples_ = 0, row_ = 0;  // matrices of sampled features; numbers a texel row
  int64_t texel_rows_ = 0, base_[TCAM_MAX_PLANES] = {};
  Real *texel_values_ = nullptr, *sampled_ = nullptr, *product_ = nullptr, *grad_texels_ = nullptr, *grad_sampled_ = nullptr,
       *grad_product_ = nullptr;
  Real *first_partials_[TCAM_MAX_PLANES + 1] = {}, *first_bias_partials_ = nullptr;
  Corners<Real>* corners_ = nullptr;
  unsigned long long* fixed_ = nullptr;
  float *largest_ = nullptr, *scale_ = nullptr;

  // Whichever costs fewer multiply-adds.
  bool choose_projected() const {
    if (!p.layers || p.reduce == TCAM_PRODUCT || p.formulation == TCAM_FEATURES) return false;
    if (p.formulation == TCAM_PROJECTED) return true;
    double all = 0;
    for (int q = 0; q < p.plane_count; ++q) all += static_cast<double>(texels(q) * held_);
    const double n = static_cast<double>(n_[2]), c = static_cast<double>(p.channels), n1 = width(1);
    const double gathered = 4. * p.plane_count, read = p.reduce == TCAM_SUM ? c : c * p.plane_count;
    return all * n1 * sizeof(Real) <= (1 << 30) && all * c * n1 + n * gathered * n1 < n * (gathered * c + read * n1);
  }
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
    for (int a = 0; a < 3; ++a) all.size[a] = p.size[a], all.lo[a] = p.lo[a], all.box[a] = p.hi[a] - p.lo[a];
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
      check(
          launch(fill_rows_kernel<Real>, element_blocks(count * n1), threads, 0, stream_, this->biases_[1], count, n1, z_[1]));
      for (int b = 0; b < plane_blocks(); ++b)
        check(gemm<Scalars<Real, 64>>(count, n1, p.channels, 0,
                                      Rows<Real>{product_ ? product_ : sample(sampled_, b), p.channels},
                                      Transposed<Real>{block_weight(b), p.width[0]}, AddRows<Real>{z_[1], n1}, stream_));
    }
    if (p.extra)
      check(gemm<Scalars<Real, 64>>(count, n1, p.extra, 0, extra(in.extra, region),
                                    Transposed<Real>{block_weight(plane_blocks()), p.width[0]}, AddRows<Real>{z_[1], n1},
                                    stream_));
  }
  Rows<Real> extra(const void* all, const Region& region) const {
    return {static_cast<const Real*>(all) + region.k0 * p.extra, p.extra};
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
    check(gemm<Scalars<Real, 64>>(width(1), block_width(b), count, voxel_chunk, Transposed<Real>{delta_[1], width(1)}, operand,
                                  AddPartial<Real>{first_partials_[b], width(1), block_width(b)}, stream_));
  }

  void first_layer_back(const tcam_inputs& in, void* out, const Region& region, const tcam_gradients& to) {
    const int64_t count = region.voxels();
    const int n1 = p.layers ? width(1) : 0;
    if (p.layers && p.grad_decoder)
      check(launch(add_column_sums_kernel<Real>, static_cast<unsigned>(ceil_div(count, bias_chunk)), channel_threads(n1), 0,
                   stream_, delta_[1], count, n1, bias_chunk, first_bias_partials_));
    if (!projected_) {
      Real* grad = grad_product_ ? grad_product_ : grad_sampled_;
      for (int b = 0; p.layers && b < plane_blocks(); ++b) {
        if (p.grad_decoder) weight_gradient(b, count, Rows<Real>{product_ ? product_ : sample(sampled_, b), p.channels});
        if (p.grad_planes || p.grad_points)
          check(gemm<Scalars<Real, 64>>(count, static_cast<int>(p.channels), n1, 0, Rows<Real>{delta_[1], n1},
                                        Rows<Real>{block_weight(b), p.width[0]},
                                        WriteRows<Real>{sample(grad, b), p.channels, nullptr}, stream_));
      }
      if (!p.layers) features(out, region, true);
      if (grad_product_ && (p.grad_planes || p.grad_points))
        check(launch(product_back_kernel<Real>, element_blocks(count * p.channels), threads, 0, stream_, sampled_,
                     grad_product_, samples_, most_ * p.channels, count * p.channels, grad_sampled_));
    }
    if (!p.extra) return;
    if (p.grad_decoder) weight_gradient(plane_blocks(), count, extra(in.extra, region));
    if (p.grad_extra)
      check(gemm<Scalars<Real, 64>>(count, static_cast<int>(p.extra), n1, 0, Rows<Real>{delta_[1], n1},
                                    Rows<Real>{block_weight(plane_blocks()), p.width[0]},
                                    WriteRows<Real>{static_cast<Real*>(to.extra) + region.k0 * p.extra, p.extra, nullptr},
                                    stream_));
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
                                        AddPartial<Real>{first_partials_[b], row_, p.channels}, stream_));
        if (out)
          check(gemm<Scalars<Real, 64>>(texels(q), static_cast<int>(p.channels), row_, 0, Rows<Real>{grad, row_},
                                        Rows<Real>{block_weight(b), p.width[0]}, WriteTransposed<Real>{out, texels(q)},
                                        stream_));
      }
  }
};

}  // namespace tcam
