// The kernels of points.cuh: taps, gathers from texels, and the gradients of texels, coordinates and features.
//
// Kernels over a wave read and write arrays of `count` points, of which point t is point first + t of the round.
#pragma once
#include "sums.cuh"

namespace tcam {

// A wave's largest gradient is scaled to below 2^fixed_exponent, so that the sum of 2^16 of them fits in 62 bits.
constexpr int fixed_exponent = 45;

// A point's four taps in a plane: the numbers of its texel rows, counted over all planes and objects, and their weights.
template <class Real>
struct TexelTaps {
  int64_t row[4];
  Real weight[4];
};

// The planes' geometry and the points of a round. Plane q's texel rows begin at base[q], object by object.
template <class Real>
struct PointPlanes {
  int count, axes;  // planes; coordinates of a point
  int row_axis[TCAM_MAX_PLANES], column_axis[TCAM_MAX_PLANES], matrix[TCAM_MAX_PLANES];
  int64_t rows[TCAM_MAX_PLANES], columns[TCAM_MAX_PLANES], base[TCAM_MAX_PLANES];
  bool align_corners, corners;
  int padding;
  Real scale[TCAM_MAX_PLANES];  // on every sample
  const Real* points;           // (all points, axes); null: the points are the voxels of `box`
  const int64_t* objects;       // (all points), each point's object; null: `each` points an object, in order
  int64_t each, object_count;
  const double* bounds;  // (3, 2), the coordinates that the grid's axes run from and to; null: -1 and 1
  GridBox box;

  TCAM_HD Tap<Real> tap(int axis, int64_t texels, int64_t point) const {
    const Axis a = {static_cast<int>(texels), align_corners, padding};
    if (points) return coordinate_tap<Real>(a, points[point * axes + axis]);
    const Tap<double> t = voxel_tap(a, box.at(axis, point), box.size[axis], corners, bounds ? bounds + 2 * axis : nullptr);
    return {t.lo, t.hi, static_cast<Real>(t.w_lo), static_cast<Real>(t.w_hi), Real(0), Real(0)};
  }
  // The object whose planes a point reads; -1: the point's index is out of range.
  TCAM_HD int64_t object(int64_t point) const {
    if (!points) return 0;
    const int64_t o = objects ? objects[point] : point / each;
    return o >= 0 && o < object_count ? o : -1;
  }
};

// taps (count, planes): the taps of each point of the wave in each plane, their weights times the plane's scale. The weights
// are NaN where a point's object is out of range. A thread owns a point and a plane.
template <class Real>
__global__ void __launch_bounds__(threads)
    place_kernel(PointPlanes<Real> p, int64_t first, int64_t count, TexelTaps<Real>* taps) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count * p.count;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t point = first + e / p.count, object = p.object(point);
    const int q = static_cast<int>(e % p.count);
    const Tap<Real> r = p.tap(p.row_axis[q], p.rows[q], point), c = p.tap(p.column_axis[q], p.columns[q], point);
    const int64_t begin = p.base[q] + (object < 0 ? 0 : object) * p.rows[q] * p.columns[q];
    const Real s = object < 0 ? static_cast<Real>(NAN) : p.scale[q];
    taps[e] = {{begin + r.lo * p.columns[q] + c.lo, begin + r.lo * p.columns[q] + c.hi, begin + r.hi * p.columns[q] + c.lo,
                begin + r.hi * p.columns[q] + c.hi},
               {r.w_lo * c.w_lo * s, r.w_lo * c.w_hi * s, r.w_hi * c.w_lo * s, r.w_hi * c.w_hi * s}};
  }
}

// out[t, :] = bias (null: 0) + sum over planes [q0, q1) of the samples at point t, planes and taps in ascending order.
//   taps (count, planes); texels (texel rows, n); bias (n); out (count, n).
// A warp owns a point, a lane every 32nd channel.
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

// Arguments of add_noise_kernel. features: `matrices` arrays (points of the wave, channels), `step` numbers from one to the
// next.
template <class Real>
struct PointNoise {
  PointPlanes<Real> planes;
  uint64_t seed;
  Real std;
  int64_t grid_object;  // the object of a grid; not used with points
  int matrices, channels;
  int64_t step;
  Real* features;
};
// Adds std times normal noise to the features of each point of the wave. The noise is a function of the seed, the object, the
// point and the feature alone (maths/noise.h). A warp owns a point, a lane every 32nd Philox block.
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

// fixed[row, :] += round(w * *scale * delta[t, :]) for each tap (row, w) of each point t in planes [q0, q1).
//   taps (count, planes); delta (count, n); fixed (texel rows, n): two's complement integers.
// Atomic additions of integers give the same sum in any order. A warp owns a point, a lane every 32nd channel.
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
        if (!(w != 0) || at.weight[x] != at.weight[x]) continue;  // no weight, or NaN: the object is out of range
        for (int c = lane; c < n; c += 32)
          atomicAdd(&fixed[at.row[x] * n + c],
                    static_cast<unsigned long long>(llrint(static_cast<double>(w * delta[t * n + c]))));
      }
    }
}

// sums[e] += fixed[e] * *unit, then fixed[e] = 0. *unit: the inverse of scatter_points_kernel's scale. A thread owns an
// element.
template <class Real>
__global__ void __launch_bounds__(threads)
    add_fixed_kernel(unsigned long long* fixed, int64_t count, const float* unit, Real* sums) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    sums[e] += static_cast<Real>(static_cast<double>(static_cast<long long>(fixed[e])) * static_cast<double>(*unit));
    fixed[e] = 0;
  }
}

// Arguments of points_gradient_kernel.
template <class Real>
struct PointGradient {
  PointPlanes<Real> planes;
  const Real* delta;   // matrices (count, n) of the gradients of samples; planes.matrix has that of each plane
  int64_t delta_step;  // numbers from one matrix to the next; 0: all planes share one
  const Real* texels;  // (texel rows, n)
  int n;
  int64_t first, count;
  Real* out;  // (all points, axes)
};
// The gradients of the coordinates: out[point, a] = sum over the planes of <delta, d sample / d coordinate a>, through the
// derivatives of the taps' weights; 0 where the point's object is out of range. A warp owns a point: each lane sums every 32nd
// channel, then the lanes join by shuffles, in one order.
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
      const Real* delta = g.delta + p.matrix[q] * g.delta_step + t * g.n;
      Real by_row = 0, by_column = 0;
      for (int x = lane; x < g.n; x += 32) {
        const Real lo_lo = from[(r.lo * p.columns[q] + c.lo) * g.n + x], lo_hi = from[(r.lo * p.columns[q] + c.hi) * g.n + x],
                   hi_lo = from[(r.hi * p.columns[q] + c.lo) * g.n + x], hi_hi = from[(r.hi * p.columns[q] + c.hi) * g.n + x];
        by_row += delta[x] * (r.d_lo * (c.w_lo * lo_lo + c.w_hi * lo_hi) + r.d_hi * (c.w_lo * hi_lo + c.w_hi * hi_hi));
        by_column += delta[x] * (c.d_lo * (r.w_lo * lo_lo + r.w_hi * hi_lo) + c.d_hi * (r.w_lo * lo_hi + r.w_hi * hi_hi));
      }
#pragma unroll
      for (int a = 0; a < TCAM_MAX_AXES; ++a) {
        if (a == p.row_axis[q]) sum[a] += by_row * p.scale[q];
        if (a == p.column_axis[q]) sum[a] += by_column * p.scale[q];
      }
    }
#pragma unroll
    for (int a = 0; a < TCAM_MAX_AXES; ++a) {
      for (int other = 16; other; other /= 2) sum[a] += __shfl_xor_sync(0xffffffffu, sum[a], other);
      if (lane == 0 && a < p.axes) g.out[point * p.axes + a] = sum[a];
    }
  }
}

// out[e] = the product of the elements e of `planes` arrays. samples: arrays of `count` numbers, `step` from one to the next.
// A thread owns an element.
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
// The gradient of product_kernel: grads[s*step + e] = grad[e] times the elements e of all arrays but s. A thread owns an e.
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

// Transposes plane (n, texels) to rows (texels, n); from_rows_kernel is the reverse. A thread owns an element.
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

// The output of a decoder without layers, out (count, matrices * n) of `dtype`: written from `matrices` arrays (count, n),
// `step` numbers from one to the next, or with `read` its gradient copied to them. A thread owns an element.
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
