// The taps of a wave's points on the CPU: four texel rows with weights for each point and plane. Points are sorted along a
// space-filling curve, so that those next to each other read and write texels that are in cache.
#pragma once
#include "../formulation.h"
#include "../maths/bilinear.h"
#include "mlp.h"

namespace tcam {

// A wave: points [begin, begin + points) of the round, which are the problem's points or the voxels of a grid's box.
struct Wave {
  long begin, points;
};

template <class Real>
class WaveTaps {
 public:
  const bool grid;     // whether the points are a grid's voxels
  const long objects;  // objects of a round: one for a grid, all for points
  const long count;    // points of a round
  const long taps;     // taps of a point, 4 in each plane
  const long most;     // points of the largest wave

  // row_pitch: reals of a texel row.
  WaveTaps(const Mlp<Real>& mlp, long wave_points, long row_pitch, Carver& ws)
      : grid(mlp.p.points < 0),
        objects(grid ? 1 : mlp.p.batch),
        count(round_points(mlp.p)),
        taps(4 * mlp.p.plane_count),
        most(wave_points),
        m(mlp),
        p(mlp.p),
        pitch(row_pitch) {
    for (int q = 0; q < p.plane_count; ++q) {
      scale_.push_back(static_cast<Real>(plane_scale(p, q)));
      base_.push_back(rows_);
      rows_ += objects * texels(q);
    }
    at_ = ws.array<int64_t>(most * taps);
    weight_ = ws.array<Real>(most * taps);
    if (!grid) {
      order_ = ws.array<int32_t>(most);
      key_ = ws.array<uint16_t>(most);
      bucket_ = ws.array<int32_t>(keys + 1);
    }
    if (!m.backward || !p.grad_points) return;
    by_row_ = ws.array<Real>(most * taps);
    by_column_ = ws.array<Real>(most * taps);
  }

  static long round_points(const tcam_problem& p) {
    if (p.points >= 0) return static_cast<long>(p.points);
    return static_cast<long>((p.hi[0] - p.lo[0]) * (p.hi[1] - p.lo[1]) * (p.hi[2] - p.lo[2]));
  }

  long rows() const { return rows_; }  // texel rows of all planes and objects of a round
  long texels(int q) const { return static_cast<long>(p.planes[q].rows * p.planes[q].columns); }
  long texel_row(int q, long object) const { return base_[static_cast<size_t>(q)] + object * texels(q); }
  long place_of(long t) const { return order_ ? order_[t] : t; }  // the point's index in the wave; t: its index in sorted order
  long number(const Wave& wave, long t) const { return wave.begin + place_of(t); }
  const int32_t* order() const { return order_; }
  // The taps in planes [q0, q1), from sorted point t on.
  PointTaps of(long q0, long q1, long t) const {
    const long at = t * taps + 4 * q0;
    return {at_ + at, weight_ + at, taps, 4 * (q1 - q0)};
  }
  // Derivatives of the weights of tap e by the coordinates of its row and column.
  Real by_row(long e) const { return by_row_[e]; }
  Real by_column(long e) const { return by_column_[e]; }

  void begin(const tcam_inputs& in, long round) {
    in_ = &in;
    round_ = round;
    if (grid) place_axes(in, round);
  }

  // Sorts the wave's points along a space-filling (Morton) curve, by counting; points with equal keys keep their order.
  void sort(const Wave& wave) {
    if (!order_) return;
    const Real* points = static_cast<const Real*>(in_->points) + wave.begin * p.axes;
    parallel_for(m.blocks, m.threads, [&](long task, int) {
      const Range range = chunk(wave.points, m.blocks, task);
      for (long t = range.lo; t < range.hi; ++t) {
        int key = 0;
        for (int a = 0; a < 3 && a < p.axes; ++a) {
          const Real c = (points[t * p.axes + a] + 1) * Real(1 << (key_bits - 1));
          const int cell = c > 0 ? (c < (1 << key_bits) ? static_cast<int>(c) : (1 << key_bits) - 1) : 0;
          for (int b = 0; b < key_bits; ++b) key |= (cell >> b & 1) << (3 * b + a);
        }
        key_[t] = static_cast<uint16_t>(key);
      }
    });
    std::memset(bucket_, 0, (keys + 1) * sizeof(int32_t));
    for (long t = 0; t < wave.points; ++t) ++bucket_[key_[t] + 1];
    for (long k = 0; k < keys; ++k) bucket_[k + 1] += bucket_[k];
    for (long t = 0; t < wave.points; ++t) order_[bucket_[key_[t]]++] = static_cast<int32_t>(t);
  }

  // Computes the taps of sorted points [range.lo, range.hi) of a wave.
  void place(const Wave& wave, Range range) {
    if (grid) return place_voxels(wave, range);
    const Real* points = static_cast<const Real*>(in_->points);
    for (long t = range.lo; t < range.hi; ++t) {
      const long n = number(wave, t);
      const long slot = in_->objects ? static_cast<long>(in_->objects[n]) : n / (p.points / p.batch);
      auto tap = [&](int axis, int64_t texels) {
        return coordinate_tap<Real>({static_cast<int>(texels), p.align_corners != 0, p.padding}, points[n * p.axes + axis]);
      };
      for (int q = 0; q < p.plane_count; ++q) {
        const tcam_plane& plane = p.planes[q];
        set_taps(t, q, slot, tap(plane.row_axis, plane.rows), tap(plane.column_axis, plane.columns));
      }
    }
  }

  // The key of a point's noise: its object, and its number in the whole grid or among its object's points. With batch_index
  // (in_->objects), the number is that among all points.
  NoiseKey noise_key(const Wave& wave, long t) const {
    const long n = number(wave, t);
    NoiseKey key = {p.noise_seed, static_cast<uint64_t>(n), static_cast<uint32_t>(round_), 0};
    if (grid) {
      key.number = static_cast<uint64_t>(box_.number(n));
    } else if (in_->objects) {
      key.object = static_cast<uint32_t>(in_->objects[n]);
    } else {
      const long each = p.points / p.batch;
      key.object = static_cast<uint32_t>(n / each), key.number = static_cast<uint64_t>(n % each);
    }
    return key;
  }

 private:
  static constexpr int key_bits = 5, keys = 1 << 3 * key_bits;  // the curve has 32 cells along each of three axes

  const Mlp<Real>& m;
  const tcam_problem& p;
  const long pitch;
  const GridBox box_ = grid_box(p);
  std::vector<Tap<Real>> voxel_taps_[2 * TCAM_MAX_PLANES];  // a grid's taps on each plane's rows (2q) and columns (2q + 1)
  std::vector<long> base_;                                  // the first texel row of each plane
  std::vector<Real> scale_;                                 // of the samples of each plane
  long rows_ = 0, round_ = 0;
  const tcam_inputs* in_ = nullptr;
  int64_t* at_;                                              // (most, taps): each tap's texel row, as an offset in reals
  int32_t *order_ = nullptr, *bucket_ = nullptr;             // (most): the points' indices in sorted order; (keys + 1): counts
  uint16_t* key_ = nullptr;                                  // (most): cell of each point on the curve
  Real *weight_, *by_row_ = nullptr, *by_column_ = nullptr;  // (most, taps)

  // Combines the taps of a grid's axes into those of voxels [range.lo, range.hi) of a wave.
  void place_voxels(const Wave& wave, Range range) {
    const long wide = p.hi[1] - p.lo[1], deep = p.hi[2] - p.lo[2], n = wave.begin + range.lo;
    long at[3] = {n / (wide * deep), n / deep % wide, n % deep};
    for (long t = range.lo; t < range.hi; ++t) {
      for (int q = 0; q < p.plane_count; ++q) {
        const std::vector<Tap<Real>>* axis_taps = voxel_taps_ + 2 * q;
        set_taps(t, q, 0, axis_taps[0][static_cast<size_t>(at[p.planes[q].row_axis])],
                 axis_taps[1][static_cast<size_t>(at[p.planes[q].column_axis])]);
      }
      if (++at[2] < deep) continue;
      at[2] = 0;
      if (++at[1] == wide) at[1] = 0, ++at[0];
    }
  }
  // Sets the four taps of point t in plane q of an object, from taps r on the plane's rows and c on its columns.
  void set_taps(long t, int q, long slot, const Tap<Real>& r, const Tap<Real>& c) {
    const long columns = static_cast<long>(p.planes[q].columns);
    const long begin = texel_row(q, slot) * pitch, e = t * taps + 4 * q;
    const Real scale = scale_[static_cast<size_t>(q)];
    auto set = [&](long x, int row, int column, Real wr, Real wc, Real dr, Real dc) {
      at_[e + x] = begin + (row * columns + column) * pitch;
      weight_[e + x] = wr * wc * scale;
      if (by_row_) by_row_[e + x] = dr * wc * scale, by_column_[e + x] = wr * dc * scale;
    };
    set(0, r.lo, c.lo, r.w_lo, c.w_lo, r.d_lo, c.d_lo);
    set(1, r.lo, c.hi, r.w_lo, c.w_hi, r.d_lo, c.d_hi);
    set(2, r.hi, c.lo, r.w_hi, c.w_lo, r.d_hi, c.d_lo);
    set(3, r.hi, c.hi, r.w_hi, c.w_hi, r.d_hi, c.d_hi);
  }
  // Computes the taps of a grid's voxels along the axes of each plane.
  void place_axes(const tcam_inputs& in, long object) {
    for (int e = 0; e < 2 * p.plane_count; ++e) {
      const tcam_plane& plane = p.planes[e / 2];
      const int axis = e % 2 ? plane.column_axis : plane.row_axis;
      const Axis a = {static_cast<int>(e % 2 ? plane.columns : plane.rows), p.align_corners != 0, p.padding};
      const double* bounds = in.bounds ? in.bounds + object * 6 + 2 * axis : nullptr;
      voxel_taps_[e].clear();
      for (int64_t i = p.lo[axis]; i < p.hi[axis]; ++i) {
        const Tap<double> v = voxel_tap(a, i, p.size[axis], p.corners != 0, bounds);
        voxel_taps_[e].push_back({v.lo, v.hi, static_cast<Real>(v.w_lo), static_cast<Real>(v.w_hi), Real(0), Real(0)});
      }
    }
  }
};

}  // namespace tcam
