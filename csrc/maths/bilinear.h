// Linear interpolation along one axis of texels, shared by host and device.
#pragma once
#include "../problem.h"

#if defined(__CUDACC__)
#define TCAM_HD __host__ __device__ inline
#else
#define TCAM_HD inline
#endif

namespace tcam {

// A box of a grid of voxels. Its voxels are numbered with the last axis fastest.
struct GridBox {
  int64_t size[3], lo[3], box[3];
  TCAM_HD int64_t at(int axis, int64_t n) const {  // the index of voxel n of the box along an axis of the whole grid
    const int64_t i = axis == 0 ? n / (box[1] * box[2]) : axis == 1 ? n / box[2] % box[1] : n % box[2];
    return lo[axis] + i;
  }
  TCAM_HD int64_t number(int64_t n) const { return (at(0, n) * size[1] + at(1, n)) * size[2] + at(2, n); }  // in the whole grid
};
inline GridBox grid_box(const tcam_problem& p) {
  GridBox g;
  for (int a = 0; a < 3; ++a) g.size[a] = p.size[a], g.lo[a] = p.lo[a], g.box[a] = p.hi[a] - p.lo[a];
  return g;
}

// The two texels around a coordinate, their weights, and the derivatives of the weights with respect to the coordinate.
template <class T>
struct Tap {
  int lo, hi;
  T w_lo, w_hi, d_lo, d_hi;
};

// An axis of `texels` texels. The coordinates -1 and 1 are the outer edges of the outer texels or, with align_corners, their
// centres, as in torch's grid_sample.
struct Axis {
  int texels;
  bool align_corners;
  int padding;  // tcam_padding
};

// The tap of x, in texels from the centre of the first, with dx its derivative with respect to the coordinate. NaN counts as 0.
template <class T>
TCAM_HD Tap<T> tap_at(const Axis& axis, T x, T dx) {
  const int m = axis.texels;
  if (x != x) x = 0;
  if (axis.padding == TCAM_PAD_ZEROS) {  // all weights are 0 at -1 and at m
    if (x < -1) x = -1, dx = 0;
    if (x > m) x = static_cast<T>(m), dx = 0;
  } else {
    if (axis.padding == TCAM_PAD_REFLECTION) {  // reflect about the edges of the axis
      const T begin = axis.align_corners ? T(0) : T(-0.5), span = static_cast<T>(axis.align_corners ? m - 1 : m);
      T y = x - begin;
      if (y < 0) y = -y, dx = -dx;
      const T turns = y / span;  // infinite if the span is 0
      if (turns < T(1 << 24)) {
        const int whole = static_cast<int>(turns);
        y -= static_cast<T>(whole) * span;
        if (whole & 1) y = span - y, dx = -dx;
        x = begin + y;
      } else {
        x = 0;
      }
    }
    if (!(x > 0)) x = 0, dx = 0;
    if (!(x < m - 1)) x = static_cast<T>(m - 1), dx = 0;
  }
  int floor = static_cast<int>(x);
  if (x < static_cast<T>(floor)) --floor;
  Tap<T> t;
  t.w_hi = x - static_cast<T>(floor);
  t.w_lo = 1 - t.w_hi;
  t.d_lo = -dx, t.d_hi = dx;
  t.lo = floor, t.hi = floor + 1;
  if (t.lo < 0) t.lo = 0, t.w_lo = 0, t.d_lo = 0;
  if (t.lo > m - 1) t.lo = m - 1, t.w_lo = 0, t.d_lo = 0;
  if (t.hi > m - 1) t.hi = m - 1, t.w_hi = 0, t.d_hi = 0;
  return t;
}

// The tap of a coordinate. NaN counts as -1.
template <class T>
TCAM_HD Tap<T> coordinate_tap(const Axis& axis, T coordinate) {
  const bool nan = coordinate != coordinate;
  if (nan) coordinate = -1;
  const T m = static_cast<T>(axis.texels);
  const T x = axis.align_corners ? (coordinate + 1) * T(0.5) * (m - 1) : ((coordinate + 1) * m - 1) * T(0.5);
  return tap_at<T>(axis, x, nan ? T(0) : axis.align_corners ? (m - 1) * T(0.5) : m * T(0.5));
}

// The tap of voxel i of n. The voxel lies at the fraction (i + 1/2)/n of the axis or, with corners, at i/(n - 1) (at 0 if n is
// 1). `bounds` holds the coordinates of the fractions 0 and 1; null: -1 and 1.
TCAM_HD Tap<double> voxel_tap(const Axis& axis, long long i, long long n, bool corners, const double* bounds) {
  double s = corners ? (n > 1 ? static_cast<double>(i) / static_cast<double>(n - 1) : 0.)
                     : (static_cast<double>(i) + 0.5) / static_cast<double>(n);
  if (bounds) s = (bounds[0] + (bounds[1] - bounds[0]) * s + 1) * 0.5;
  if (s != s) s = 0;
  return tap_at<double>(axis, axis.align_corners ? s * (axis.texels - 1) : s * axis.texels - 0.5, 0.);
}

}  // namespace tcam
