// Linear interpolation along one axis, written once for host and device.
#pragma once

#if defined(__CUDACC__)
#define TCAM_HD __host__ __device__ inline
#else
#define TCAM_HD inline
#endif

namespace tcam {

// The two texels that a voxel reads on one axis, and their weights.
struct Taps {
  int lo, hi;
  double w_lo, w_hi;
};

// Voxel i of n has its centre at s = (i + 1/2)/n of the axis. In texels that is
// s*m - 1/2 (align_corners false: texels are cells) or s*(m - 1) (true: texels are
// corners). Padding "border" clamps the coordinate, "zeros" drops taps outside.
TCAM_HD Taps linear_taps(long long i, long long n, int m, bool align_corners, bool zeros) {
  const double s = (static_cast<double>(i) + 0.5) / static_cast<double>(n);
  double x = align_corners ? s * (m - 1) : s * m - 0.5;
  if (!zeros) x = x < 0 ? 0 : (x > m - 1 ? m - 1 : x);
  int f = static_cast<int>(x);
  if (x < f) --f;  // floor; x > -1 always
  Taps t;
  t.w_hi = x - f;
  t.w_lo = 1.0 - t.w_hi;
  t.lo = f;
  t.hi = f + 1;
  if (t.lo < 0) t.lo = 0, t.w_lo = 0;
  if (t.hi > m - 1) {
    t.hi = m - 1;
    if (zeros) t.w_hi = 0;
  }
  return t;
}

}  // namespace tcam
