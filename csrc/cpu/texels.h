// Kernels over rows of features and texels: the first layer and its gradient, gather to points and scatter from them, maps.
// Included only by voxel_core.cpp, under the rules of simd.h.
#pragma once
#include "products.h"

namespace tcam {
namespace TCAM_ISA {

// ---- texels ----------------------------------------------------------------------------

constexpr long texel_pitch = TCAM_MAX_WIDTH + 16;  // 16 more to spread rows over cache sets

template <class N>
static void load_features(const Features& f, long s, long count, long rows, typename N::Real* tile) {
  typedef typename N::Real Real;
  const long padded = round_up(f.channels, columns_of<N>());
  const Real* data = static_cast<const Real*>(f.data) + s * f.row_stride;
  if (f.channel_stride == 1) {
    for (long t = 0; t < count; ++t)
      for (long c = 0; c < f.channels; ++c) tile[t * texel_pitch + c] = data[t * f.row_stride + c];
  } else {
    for (long c = 0; c < f.channels; ++c)
      for (long t = 0; t < count; ++t) tile[t * texel_pitch + c] = data[t * f.row_stride + c * f.channel_stride];
  }
  for (long t = 0; t < rows; ++t)
    for (long c = t < count ? f.channels : 0; c < padded; ++c) tile[t * texel_pitch + c] = 0;
}

template <class N>
static void project(const Features& f, long s0, long s1, const void* weights, long n, void* out, long stride, bool add,
                    void* scratch) {
  typedef typename N::Real Real;
  typedef typename N::Vec Vec;
  Real* tile = static_cast<Real*>(scratch);
  for (long s = s0; s < s1; s += max_tile) {
    const long count = s1 - s < max_tile ? s1 - s : max_tile;
    const long rows = round_up(count, register_rows);
    load_features<N>(f, s, count, rows, tile);
    times_packed<N, texel_pitch>(rows, f.channels, n, tile, weights, nullptr,
                                 [&](const Tile<N>& t, long r, long c) __attribute__((always_inline)) {
                                   for (int i = 0; i < register_rows && r + i < count; ++i)
                                     for (int v = 0; v < register_vectors; ++v) {
                                       Real* to = static_cast<Real*>(out) + (s + r + i) * stride + c + v * N::lanes;
                                       store(to, add ? load<Vec>(to) + t.v[i][v] : t.v[i][v]);
                                     }
                                 });
  }
}

template <class N>
static void unproject(const void* grad, long stride, const Features& f, long s0, long s1, const void* weights, long n,
                      void* grad_features, void* grad_weights, void* scratch) {
  typedef typename N::Real Real;
  constexpr int nr = columns_of<N>();
  Real* features = static_cast<Real*>(scratch);
  Real* delta = features + max_tile * texel_pitch;
  for (long s = s0; s < s1; s += max_tile) {
    const long count = s1 - s < max_tile ? s1 - s : max_tile;
    const long rows = round_up(count, register_rows);
    for (long t = 0; t < rows; ++t)
      for (long c = 0; c < stride; ++c)
        delta[t * texel_pitch + c] = t < count ? static_cast<const Real*>(grad)[(s + t) * stride + c] : Real(0);
    if (grad_weights) {
      load_features<N>(f, s, count, rows, features);
      add_outer<N, texel_pitch>(count, n, f.channels, delta, features, static_cast<Real*>(grad_weights),
                                round_up(f.channels, nr));
    }
    if (weights) {
      times_packed<N, texel_pitch>(rows, n, f.channels, delta, weights, nullptr,
                                   [&](const Tile<N>& t, long r, long c) __attribute__((always_inline)) {
                                     for (int i = 0; i < register_rows; ++i)
                                       for (int v = 0; v < register_vectors; ++v)
                                         store(features + (r + i) * texel_pitch + c + v * N::lanes, t.v[i][v]);
                                   });
      Real* out = static_cast<Real*>(grad_features) + s * f.row_stride;
      for (long c = 0; c < f.channels; ++c)
        for (long t = 0; t < count; ++t) out[t * f.row_stride + c * f.channel_stride] = features[t * texel_pitch + c];
    }
  }
}

// ---- texel rows of points ----------------------------------------------------------------

template <class N>
static void gather(const void* texels, const PointTaps& taps, long count, const void* bias, void* out, long out_stride,
                   long n) {
  typedef typename N::Real Real;
  typedef typename N::Vec Vec;
  const Real* from = static_cast<const Real*>(texels);
  for (long t = 0; t < count; ++t) {
    const int64_t* at = taps.at + t * taps.pitch;
    const Real* w = static_cast<const Real*>(taps.weights) + t * taps.pitch;
    Real* to = static_cast<Real*>(out) + t * out_stride;
    long c = 0;
    for (; c + 4 * N::lanes <= n; c += 4 * N::lanes) {  // four vectors at once share the reads of a tap's weight and place
      Vec v[4];
#pragma GCC unroll 4
      for (int e = 0; e < 4; ++e) v[e] = bias ? load<Vec>(static_cast<const Real*>(bias) + c + e * N::lanes) : Vec{};
      for (long q = 0; q < taps.taps; ++q) {
        const Vec k = w[q] - Vec{};
        const Real* row = from + at[q] + c;
#pragma GCC unroll 4
        for (int e = 0; e < 4; ++e) v[e] += k * load<Vec>(row + e * N::lanes);
      }
#pragma GCC unroll 4
      for (int e = 0; e < 4; ++e) store(to + c + e * N::lanes, v[e]);
    }
    for (; c < n; c += N::lanes) {
      Vec v = bias ? load<Vec>(static_cast<const Real*>(bias) + c) : Vec{};
      for (long q = 0; q < taps.taps; ++q) v += (w[q] - Vec{}) * load<Vec>(from + at[q] + c);
      store(to + c, v);
    }
  }
}

template <class N>
static void scatter(void* texels, const PointTaps& taps, long count, const void* delta, long delta_stride, long c0, long c1) {
  typedef typename N::Real Real;
  typedef typename N::Vec Vec;
  constexpr long ahead = 16;
  Real* to = static_cast<Real*>(texels);
  for (long t = 0; t < count; ++t) {
    const int64_t* at = taps.at + t * taps.pitch;
    const Real* w = static_cast<const Real*>(taps.weights) + t * taps.pitch;
    const Real* x = static_cast<const Real*>(delta) + t * delta_stride;
    if (t + ahead < count)  // hardware prefetchers do not detect this pattern: a slice of each row
      for (long c = c0; c < c1; c += 64 / static_cast<long>(sizeof(Real))) __builtin_prefetch(x + ahead * delta_stride + c);
    if (taps.taps == 4 && w[0] != 0 && w[1] != 0 && w[2] != 0 && w[3] != 0) {
      // The four rows differ, so all are read before any is written. Rows of a plane are powers of two apart, and a read stalls
      // behind a write to an address with the same last 12 bits.
      const Vec k[4] = {w[0] - Vec{}, w[1] - Vec{}, w[2] - Vec{}, w[3] - Vec{}};
      for (long c = c0; c < c1; c += N::lanes) {
        const Vec d = load<Vec>(x + c);
        Vec v[4];
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) v[q] = load<Vec>(to + at[q] + c) + k[q] * d;
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) store(to + at[q] + c, v[q]);
      }
      continue;
    }
    for (long q = 0; q < taps.taps; ++q) {
      if (w[q] == 0) continue;  // outside the plane, or exactly on a texel
      const Vec k = w[q] - Vec{};
      Real* row = to + at[q];
      for (long c = c0; c < c1; c += N::lanes) store(row + c, load<Vec>(row + c) + k * load<Vec>(x + c));
    }
  }
}

template <class N>
static void dot(const void* texels, const PointTaps& taps, long count, const void* delta, long delta_stride, long n,
                void* dots) {
  typedef typename N::Real Real;
  typedef typename N::Vec Vec;
  for (long t = 0; t < count; ++t) {
    const int64_t* at = taps.at + t * taps.pitch;
    const Real* x = static_cast<const Real*>(delta) + t * delta_stride;
    for (long q = 0; q < taps.taps; ++q) {
      const Real* row = static_cast<const Real*>(texels) + at[q];
      Vec sum = {};
      for (long c = 0; c < n; c += N::lanes) sum += load<Vec>(row + c) * load<Vec>(x + c);
      Real lane[N::lanes];
      store(lane, sum);
      static_cast<Real*>(dots)[t * taps.pitch + q] = sum_lanes<Real, N::lanes>(lane);
    }
  }
}

// ---- rows of maps ----------------------------------------------------------------------

template <class N>
static void bilinear_row(const void* const src[4], const double w[4], const void* bias, void* dst, long stride) {
  typedef typename N::Vec Vec;
  const typename N::Real* p[4];
  Vec k[4];
  for (int t = 0; t < 4; ++t) {
    p[t] = static_cast<const typename N::Real*>(src[t]);
    k[t] = N::Arith::splat(w[t]);
  }
  typename N::Real* out = static_cast<typename N::Real*>(dst);
  const typename N::Real* add = static_cast<const typename N::Real*>(bias);
  for (long c = 0; c < stride; c += N::lanes) {
    Vec v = add ? load<Vec>(add + c) : Vec{};
    for (int t = 0; t < 4; ++t) v += k[t] * load<Vec>(p[t] + c);
    store(out + c, v);
  }
}

template <class N>
static void add_scaled(void* dst, const void* src, double w, long n) {
  typedef typename N::Vec Vec;
  const Vec k = N::Arith::splat(w);
  typename N::Real* out = static_cast<typename N::Real*>(dst);
  const typename N::Real* in = static_cast<const typename N::Real*>(src);
  for (long c = 0; c < n; c += N::lanes) store(out + c, load<Vec>(out + c) + k * load<Vec>(in + c));
}

}  // namespace TCAM_ISA
}  // namespace tcam
