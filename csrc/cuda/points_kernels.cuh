// The kernels of points.cuh: a wave's points to texels and back.
#pragma once
#include "sums.cuh"

namespace tcam {

constexpr int fixed_exponent = 45;  // of the largest contribution: 2^16 of them fit 62 bits

// Where a point reads a plane: rows of texels, in rows, and their weights.
template <class Real>
struct TexelTaps {
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
  int64_t each, object_count;
  const double* bounds;  // of a grid's object; null: none
  GridBox box;

  TCAM_HD Tap<Real> tap(int axis, int64_t texels, int64_t point) const {
    const Axis a = {static_cast<int>(texels), align_corners, padding};
    if (points) return coordinate_tap<Real>(a, points[point * axes + axis]);
    const Tap<double> t = voxel_tap(a, box.at(axis, point), box.size[axis], corners, bounds ? bounds + 2 * axis : nullptr);
    return {t.lo, t.hi, static_cast<Real>(t.w_lo), static_cast<Real>(t.w_hi), Real(0), Real(0)};
  }
  // The object whose texels a point reads; -1: there is none such.
  TCAM_HD int64_t object(int64_t point) const {
    if (!points) return 0;
    const int64_t o = objects ? objects[point] : point / each;
    return o >= 0 && o < object_count ? o : -1;
  }
};

// taps (points, planes) of the wave's points; a point without an object gets NaN.
template <class Real>
__global__ void __launch_bounds__(threads)
    place_kernel(PointPlanes<Real> p, int64_t first, int64_t count, TexelTaps<Real>* taps) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count * p.count;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t point = first + e / p.count, object = p.object(point);
    const int q = static_cast<int>(e % p.count);
    const Tap<Real> r = p.tap(p.row_axis[q], p.rows[q], point), c = p.tap(p.column_axis[q], p.columns[q], point);
    const int64_t begin = p.base[q] + (object < 0 ? 0 : object) * p.rows[q] * p.columns[q];
    const Real s = object < 0 ? static_cast<Real>(NAN) : p.scale;
    taps[e] = {{begin + r.lo * p.columns[q] + c.lo, begin + r.lo * p.columns[q] + c.hi, begin + r.hi * p.columns[q] + c.lo,
                begin + r.hi * p.columns[q] + c.hi},
               {r.w_lo * c.w_lo * s, r.w_lo * c.w_hi * s, r.w_hi * c.w_lo * s, r.w_hi * c.w_hi * s}};
  }
}

// out (points, n) = bias (null: 0) + the sum of the texels (rows, n) of planes [q0, q1). A warp takes a point.
template <class Real>
__global__ void __launch_bounds__(threads)
    gather_points_kernel(const TexelTaps<Real>* taps, int planes, int q0, int q1, int64_t count, const Real* texels, int n,
                         const Real* bias, Real* out) {
  const int lane = threadIdx.x % 32;
  for (int64_t t = blockIdx.x * static_cast<int64_t>(warps) + threadIdx.x / 32; t < count;
       t += static_cast<int64_t>(gridDim.x) * warps)
    for (int c = lane; c < n; c += 32) {
      Real sum = bias ? bias[c] : Real(0);
      for (int q = q0; q < q1; ++q) {
        const TexelTaps<Real>& at = taps[t * planes + q];
#pragma unroll
        for (int x = 0; x < 4; ++x) sum += at.weight[x] * texels[at.row[x] * n + c];
      }
      out[t * n + c] = sum;
    }
}

// Adds std times normal noise to the features of points, `matrices` arrays (points, channels), `step` apart. A warp takes a
// point.
template <class Real>
struct PointNoise {
  PointPlanes<Real> planes;
  uint64_t seed;
  Real std;
  int64_t grid_object;  // of a grid: the object that it is of
  int matrices, channels;
  int64_t step;
  Real* features;
};
template <class Real>
__global__ void __launch_bounds__(threads) add_noise_kernel(PointNoise<Real> n, int64_t first, int64_t count) {
  const PointPlanes<Real>& p = n.planes;
  const int lane = threadIdx.x % 32, features = n.matrices * n.channels;
  const int blocks = static_cast<int>(noise_blocks(features));
  for (int64_t t = blockIdx.x * static_cast<int64_t>(warps) + threadIdx.x / 32; t < count;
       t += static_cast<int64_t>(gridDim.x) * warps) {
    const int64_t point = first + t, object = p.points ? p.object(point) : n.grid_object;
    NoiseKey key = {n.seed, 0, static_cast<uint32_t>(object < 0 ? 0 : object), 0};
    key.number = static_cast<uint64_t>(!p.points ? p.box.number(point) : p.objects ? point : point % p.each);
    for (int b = lane; b < blocks; b += 32) {
      float word[4];
      Noise<ScalarNoise>::block(key, static_cast<uint32_t>(b), word);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int f = w * blocks + b;
        if (f < features) n.features[f / n.channels * n.step + t * n.channels + f % n.channels] += n.std * word[w];
      }
    }
  }
}

// Adds delta (points, n) to the texels of planes [q0, q1), in units of 1/scale.
template <class Real>
__global__ void __launch_bounds__(threads)
    scatter_points_kernel(const TexelTaps<Real>* taps, int planes, int q0, int q1, int64_t count, const Real* delta, int n,
                          const float* scale, unsigned long long* fixed) {
  const int lane = threadIdx.x % 32;
  const Real s = static_cast<Real>(*scale);
  for (int64_t t = blockIdx.x * static_cast<int64_t>(warps) + threadIdx.x / 32; t < count;
       t += static_cast<int64_t>(gridDim.x) * warps)
    for (int q = q0; q < q1; ++q) {
      const TexelTaps<Real>& at = taps[t * planes + q];
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

}  // namespace tcam
