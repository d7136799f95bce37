// A plane of a grid on the CPU: the taps of the box's voxels along its axes, and bilinear sampling of its features.
#pragma once
#include "../formulation.h"
#include "../maths/bilinear.h"
#include "mlp.h"

namespace tcam {

// Voxels (x, y) of the plane's map are along the lower and the higher of its axes. Texel (x, y) is at x * x_step + y * y_step:
// where rows run over the higher axis, a map's rows are the plane's columns.
template <class Real>
class GridPlane {
 public:
  const int number, x_axis, y_axis, map;  // map: 0: (i, j), 1: (j, k), 2: (i, k)
  const bool swapped;                     // rows run over the higher axis
  const long rows, columns, x_step, y_step;
  std::vector<Tap<double>> x_taps, y_taps;  // of the box's voxels; those of x include the plane's scale
  Range x_used{0, 0}, y_used{0, 0};         // the texels that they read

  GridPlane(const tcam_problem& problem, int q)
      : number(q),
        x_axis(std::min(problem.planes[q].row_axis, problem.planes[q].column_axis)),
        y_axis(std::max(problem.planes[q].row_axis, problem.planes[q].column_axis)),
        map(x_axis == 1   ? 1
            : y_axis == 1 ? 0
                          : 2),
        swapped(problem.planes[q].row_axis > problem.planes[q].column_axis),
        rows(problem.planes[q].rows),
        columns(problem.planes[q].columns),
        x_step(swapped ? 1 : columns),
        y_step(swapped ? columns : 1),
        p(problem) {}

  long texels() const { return rows * columns; }
  long x_texels() const { return swapped ? columns : rows; }
  // The texels that the box reads, as rows and columns.
  Range used_rows() const { return swapped ? y_used : x_used; }
  Range used_columns() const { return swapped ? x_used : y_used; }
  // Offset of an object's features in the arrays of the plane, (B, C, rows, columns).
  long object(long number) const { return number * static_cast<long>(p.channels) * texels(); }

  void place(const double* bounds) {
    auto taps = [&](int axis, long texels, double scale, Range& used) {
      std::vector<Tap<double>> t;
      used = {texels, 0};
      for (long i = p.lo[axis]; i < p.hi[axis]; ++i) {
        t.push_back(voxel_tap({static_cast<int>(texels), p.align_corners != 0, p.padding}, i, p.size[axis], p.corners != 0,
                              bounds ? bounds + 2 * axis : nullptr));
        used = {std::min<long>(used.lo, t.back().lo), std::max<long>(used.hi, t.back().hi + 1)};
        t.back().w_lo *= scale, t.back().w_hi *= scale;
      }
      return t;
    };
    x_taps = taps(x_axis, x_texels(), plane_scale(p, number), x_used);
    y_taps = taps(y_axis, swapped ? rows : columns, 1.0, y_used);
  }

  // Samples one channel at voxels x0 <= x < x0 + count and all y: calls put(x - x0, y, sample). buffer: `columns` reals.
  template <class Put>
  void sample(const Real* channel, long x0, long count, Real* buffer, Put put) const {
    each_row(x0, count, [&](long outer, const Tap<double>& t, const Tap<double>* taps, long n, Range used) {
      const Real *lo = channel + t.lo * columns, *hi = channel + t.hi * columns;
      const Real w_lo = static_cast<Real>(t.w_lo), w_hi = static_cast<Real>(t.w_hi);
      for (long c = used.lo; c < used.hi; ++c) buffer[c] = w_lo * lo[c] + w_hi * hi[c];
      for (long e = 0; e < n; ++e) {
        const Tap<double>& u = taps[e];
        const Real v = static_cast<Real>(u.w_lo) * buffer[u.lo] + static_cast<Real>(u.w_hi) * buffer[u.hi];
        swapped ? put(e, outer, v) : put(outer, e, v);
      }
    });
  }

  // The adjoint: adds the gradients get(x - x0, y) of these samples to the channel's texels.
  template <class Get>
  void spread(Get get, long x0, long count, Real* buffer, Real* channel) const {
    each_row(x0, count, [&](long outer, const Tap<double>& t, const Tap<double>* taps, long n, Range used) {
      Real *lo = channel + t.lo * columns, *hi = channel + t.hi * columns;
      const Real w_lo = static_cast<Real>(t.w_lo), w_hi = static_cast<Real>(t.w_hi);
      std::fill(buffer + used.lo, buffer + used.hi, Real(0));
      for (long e = 0; e < n; ++e) {
        const Tap<double>& u = taps[e];
        const Real v = swapped ? get(e, outer) : get(outer, e);
        buffer[u.lo] += static_cast<Real>(u.w_lo) * v;
        buffer[u.hi] += static_cast<Real>(u.w_hi) * v;
      }
      for (long c = used.lo; c < used.hi; ++c) lo[c] += w_lo * buffer[c];
      for (long c = used.lo; c < used.hi; ++c) hi[c] += w_hi * buffer[c];
    });
  }

 private:
  const tcam_problem& p;

  // Calls f(voxel, its tap, the taps of the other axis, their number, the columns that they read) for the voxels of the axis
  // that runs over the plane's rows.
  template <class F>
  void each_row(long x0, long count, F f) const {
    const Tap<double>* x = x_taps.data() + x0;
    const Tap<double>* inner = swapped ? x : y_taps.data();
    const long n = swapped ? count : static_cast<long>(y_taps.size());
    Range used = {columns, 0};
    for (long e = 0; e < n; ++e) used = {std::min<long>(used.lo, inner[e].lo), std::max<long>(used.hi, inner[e].hi + 1)};
    const long outer = swapped ? static_cast<long>(y_taps.size()) : count;
    for (long e = 0; e < outer; ++e) f(e, swapped ? y_taps[static_cast<size_t>(e)] : x[e], inner, n, used);
  }
};

}  // namespace tcam
