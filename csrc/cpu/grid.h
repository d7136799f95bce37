// The first layer of a grid on the CPU, for planes that are concatenated or added, so that the first layer separates into maps
// over pairs of axes.
//
// Forward projects each plane (its texels times the plane's block of W_1), then samples the projected planes into the maps
// A (i, j), B (j, k) and G (i, k), one slab of i at a time; planes over the same pair of axes add up in one map. The voxel loop
// reads z_1 = A + B + G, in blocks of (j, k). Backward walks the same blocks. Each adds its sums of z_1's gradient to maps of
// its own; these are combined in block order, spread to the texels, and multiplied by W_1 for the gradients of the planes.
#pragma once
#include <cmath>

#include "../formulation.h"
#include "../maths/bilinear.h"
#include "first_weights.h"

namespace tcam {

constexpr long texel_chunks = 16;  // chunks of a plane's texels in project and unproject; fixed, so that sums have one order

// The partition of a grid into slabs of i, and of a slab into blocks of (j, k). It depends on the problem alone.
struct Partition {
  static constexpr long max_bytes = 32l << 20;  // bytes of a slab's maps and of their gradients
  long n[3];                                    // voxels of the box along i, j, k
  long slab, j_chunks, k_chunks;                // i of a slab; ranges of j and of k, whose pairs are the blocks

  Partition(const tcam_problem& p, bool backward) {
    for (int d = 0; d < 3; ++d) n[d] = p.hi[d] - p.lo[d];
    const long voxels = n[0] * n[1] * n[2];
    const long wanted = std::min<long>(std::max<long>(voxels / 2048, 1), backward ? 64 : 1024);
    const long side = std::max<long>(1, std::lround(std::sqrt(static_cast<double>(wanted))));
    j_chunks = std::max<long>(1, std::min(n[1], side));
    k_chunks = std::max<long>(1, std::min(n[2], wanted / j_chunks));
    j_chunks = std::max<long>(1, std::min(n[1], wanted / k_chunks));
    const Engine& real = pick_engine(p.dtype == TCAM_F64 ? 1 : 0);
    const long row = round_up(p.first_width, real.columns) * real.real_bytes;
    long per_i = (n[1] + n[2]) * row;
    if (backward) per_i += (k_chunks * n[1] + j_chunks * n[2]) * row;
    slab = std::max<long>(1, std::min(n[0], max_bytes / std::max<long>(per_i, 1)));
  }
};

template <class Real_>
class Grid {
 public:
  using Real = Real_;

  // The number of blocks of a slab.
  static long blocks(const tcam_problem& problem, bool backward) {
    const Partition w(problem, backward);
    return w.j_chunks * w.k_chunks;
  }

  Grid(const Mlp<Real>& mlp, Carver& ws) : m(mlp), p(m.p), w(p, m.backward), weights(m, texel_chunks, w.n[1], ws) {
    for (int q = 0; q < p.plane_count; ++q) {
      const tcam_plane& s = p.planes[q];
      const int map = s.row_axis + s.column_axis == 1 ? 0 : s.row_axis == 1 ? 1 : 2;
      char* projected = ws.take(m.row_bytes(s.rows * s.columns));
      planes.push_back(
          {map, s.row_axis, s.column_axis, s.rows, s.columns, plane_scale(p, q), {}, {}, projected, nullptr, nullptr});
    }
    a = ws.take(m.row_bytes(w.slab * w.n[1]));
    b = ws.take(m.row_bytes(w.n[1] * w.n[2]));
    g = ws.take(m.row_bytes(w.slab * w.n[2]));
    if (!m.backward) return;
    for (Plane& q : planes) {
      q.grad_projected = ws.take(m.row_bytes(q.texels()));
      q.grad_rows = ws.take(m.row_bytes(q.rows * w.n[q.column_axis]));
    }
    da = ws.take(m.row_bytes(w.k_chunks * w.slab * w.n[1]));
    db = ws.take(m.row_bytes(w.n[1] * w.n[2]));
    dg = ws.take(m.row_bytes(w.j_chunks * w.slab * w.n[2]));
  }

  struct Piece {  // a slab: i0 to i0 + ni
    long i0, ni;
  };
  template <class F>
  void each_piece(F f) {
    for (long i0 = 0; i0 < w.n[0]; i0 += w.slab) f(Piece{i0, std::min(w.slab, w.n[0] - i0)});
  }

  long rounds() const { return static_cast<long>(p.batch); }
  void pack(const tcam_inputs& in) { weights.pack(in); }
  void clear_gradients() { weights.clear_gradients(); }
  void write_gradients(const tcam_gradients& to, long object) const { weights.write_gradients(to, object); }

  // Projects an object's planes and samples the map B.
  void begin(const tcam_inputs& in, long object) {
    if (in.bounds || object == 0) place(in.bounds ? in.bounds + object * 6 : nullptr);
    const long chunks = weights.chunks;
    parallel_for(p.plane_count * chunks, m.threads, [&](long task, int thread) {
      const Plane& q = planes[static_cast<size_t>(task / chunks)];
      const Range s = chunk(q.texels(), chunks, task % chunks);
      m.real.project(features(q, in.planes[task / chunks], object), s.lo, s.hi,
                     weights.weights(weights.block_of(task / chunks)), m.n1, q.projected, m.stride, false, m.scratch(thread));
    });
    parallel_for(w.n[1], m.threads, [&](long j, int) { map_row(1, j, w.n[2], nullptr, b + m.row_bytes(j * w.n[2])); });
  }
  void begin_gradients() {
    zero(db, m.row_bytes(w.n[1] * w.n[2]), m.threads);
    for (Plane& q : planes) zero(q.grad_rows, m.row_bytes(q.rows * w.n[q.column_axis]), m.threads);
  }

  // Samples the maps A and G of a slab, and returns them with B.
  Maps maps(const Piece& slab) {
    parallel_for(2 * slab.ni, m.threads, [&](long task, int) {
      const long i = task / 2;
      if (task % 2)
        map_row(2, slab.i0 + i, w.n[2], nullptr, g + m.row_bytes(i * w.n[2]));
      else  // A includes b_1
        map_row(0, slab.i0 + i, w.n[1], weights.bias(), a + m.row_bytes(i * w.n[1]));
    });
    const long s = m.stride, wide = w.n[1], deep = w.n[2];
    return {a, b, g, wide * s, s, deep * s, s, deep * s, s, wide, deep, s, nullptr};
  }
  Block block(const Piece& slab, long task) const {
    const Range j = chunk(w.n[1], w.j_chunks, task / w.k_chunks), k = chunk(w.n[2], w.k_chunks, task % w.k_chunks);
    return {0, slab.ni, j.lo, j.hi, k.lo, k.hi};
  }
  long first_voxel(const Piece& slab) const { return slab.i0 * w.n[1] * w.n[2]; }
  void forward_block(const Piece&, const Volume&, long, int) {}

  void begin_backward(const Piece&) {
    zero(da, m.row_bytes(w.k_chunks * w.slab * w.n[1]), m.threads);
    zero(dg, m.row_bytes(w.j_chunks * w.slab * w.n[2]), m.threads);
  }
  BlockGradients gradients(const Piece&, long task) const {
    const long kc = task % w.k_chunks, jc = task / w.k_chunks;
    return {da + m.row_bytes(kc * w.slab * w.n[1]), db, dg + m.row_bytes(jc * w.slab * w.n[2]), nullptr};
  }
  void backward_block(const Piece&, const Volume&, long, int, const tcam_gradients&) {}

  // Sums the blocks' parts of dA and dG in block order and spreads them along i to the rows of the planes.
  void end_backward(const Piece& slab) {
    auto combine = [&](int map, char* parts, long count, long columns, long x) {
      for (long i = 0; i < slab.ni; ++i) {
        Real* total = reals(parts) + (i * columns + x) * m.stride;
        for (long q = 1; q < count; ++q) m.real.add_scaled(total, total + q * w.slab * columns * m.stride, 1.0, m.stride);
        for (const Plane& q : planes)
          if (q.map == map)
            spread(q.row_taps[static_cast<size_t>(slab.i0 + i)], reals(q.grad_rows) + x * m.stride, columns * m.stride, total);
        if (map == 0) weights.add_bias_gradient(x, total);
      }
    };
    parallel_for(w.n[1] + w.n[2], m.threads, [&](long x, int) {
      if (x < w.n[1])
        combine(0, da, w.k_chunks, w.n[1], x);
      else
        combine(2, dg, w.j_chunks, w.n[2], x - w.n[1]);
    });
  }

  // Computes the gradients of an object's planes and adds to the partial sums of W_1.
  void end(const tcam_inputs& in, long object, const tcam_gradients& to) {
    gradients_to_texels();
    unproject(object, in, to);
  }

 private:
  struct Plane {
    int map, row_axis, column_axis;  // the map it contributes to, 0: A, 1: B, 2: G; its axes
    long rows, columns;
    double scale;  // of every sample
    std::vector<Tap<double>> row_taps, column_taps;
    char *projected, *grad_projected, *grad_rows;  // (rows, columns), the same, (rows, voxels of the column axis); n_1 each
    long texels() const { return rows * columns; }
  };
  const Mlp<Real>& m;
  const tcam_problem& p;
  const Partition w;
  FirstWeights<Real> weights;
  std::vector<Plane> planes;
  char *a, *b, *g;  // the maps: (slab, nj), (nj, nk), (slab, nk), rows of n_1 padded
  // Their gradients: da (k chunks, slab, nj), db (nj, nk), dg (j chunks, slab, nk). No two blocks of a slab write the same row.
  char *da = nullptr, *db = nullptr, *dg = nullptr;

  static Real* reals(char* p) { return reinterpret_cast<Real*>(p); }
  Features features(const Plane& plane, const void* data, long object) const {
    return {static_cast<const Real*>(data) + object * p.channels * plane.texels(), static_cast<long>(p.channels), 1,
            plane.texels()};
  }

  void place(const double* bounds) {
    for (Plane& q : planes) {
      auto taps = [&](int axis, long texels, double scale) {
        std::vector<Tap<double>> t;
        for (long i = p.lo[axis]; i < p.hi[axis]; ++i) {
          t.push_back(voxel_tap({static_cast<int>(texels), p.align_corners != 0, p.padding}, i, p.size[axis], p.corners != 0,
                                bounds ? bounds + 2 * axis : nullptr));
          t.back().w_lo *= scale, t.back().w_hi *= scale;
        }
        return t;
      };
      q.row_taps = taps(q.row_axis, q.rows, q.scale);
      q.column_taps = taps(q.column_axis, q.columns, 1.0);
    }
  }

  // Row x of a map: out[y] = bias (null: 0) + the sum of the map's planes sampled at (x, y), for y < columns.
  void map_row(int map, long x, long columns, const void* bias, char* out) {
    bool started = false;
    auto start = [&](long y) -> const void* { return started ? out + m.row_bytes(y) : bias; };
    for (const Plane& q : planes) {
      if (q.map != map) continue;
      const Tap<double>& t = q.row_taps[static_cast<size_t>(x)];
      for (long y = 0; y < columns; ++y) {
        const Tap<double>& u = q.column_taps[static_cast<size_t>(y)];
        auto row = [&](long r, long c) { return q.projected + m.row_bytes(r * q.columns + c); };
        const void* src[4] = {row(t.lo, u.lo), row(t.lo, u.hi), row(t.hi, u.lo), row(t.hi, u.hi)};
        const double k[4] = {t.w_lo * u.w_lo, t.w_lo * u.w_hi, t.w_hi * u.w_lo, t.w_hi * u.w_hi};
        m.real.bilinear_row(src, k, start(y), out + m.row_bytes(y), m.stride);
      }
      started = true;
    }
    for (long y = 0; !started && y < columns; ++y) {  // no plane has this pair of axes
      if (bias)
        std::memcpy(out + m.row_bytes(y), bias, m.row_bytes(1));
      else
        std::memset(out + m.row_bytes(y), 0, m.row_bytes(1));
    }
  }

  // The adjoint of a tap: adds `from` (n_1) times the tap's weights to rows t.lo and t.hi, `step` reals from row to row.
  void spread(const Tap<double>& t, Real* to, long step, const Real* from) {
    m.real.add_scaled(to + t.lo * step, from, t.w_lo, m.stride);
    m.real.add_scaled(to + t.hi * step, from, t.w_hi, m.stride);
  }

  // Spreads dB along j to the rows of its planes, then all planes' grad_rows along the columns to grad_projected.
  void gradients_to_texels() {
    parallel_for(w.n[2], m.threads, [&](long k, int) {
      for (const Plane& q : planes)
        for (long j = 0; q.map == 1 && j < w.n[1]; ++j)
          spread(q.row_taps[static_cast<size_t>(j)], reals(q.grad_rows) + k * m.stride, w.n[2] * m.stride,
                 reals(db) + (j * w.n[2] + k) * m.stride);
    });
    for (const Plane& q : planes) {  // then along the columns
      zero(q.grad_projected, m.row_bytes(q.texels()), m.threads);
      const long voxels = w.n[q.column_axis];
      parallel_for(q.rows, m.threads, [&](long r, int) {
        for (long y = 0; y < voxels; ++y)
          spread(q.column_taps[static_cast<size_t>(y)], reals(q.grad_projected) + r * q.columns * m.stride, m.stride,
                 reals(q.grad_rows) + (r * voxels + y) * m.stride);
      });
    }
  }

  // Computes the gradients of the planes from grad_projected, and adds to the partial sums of W_1.
  void unproject(long object, const tcam_inputs& in, const tcam_gradients& to) {
    const long chunks = weights.chunks;
    // The planes of a group share the partial sums of its block of weights, so they are processed one after another.
    for (long number = 0, done = 0; done < p.plane_count; ++number) {
      std::vector<long> turn;  // plane `number` of each group
      for (int g = 0; g < p.group_count; ++g) {
        const PlaneRange group = planes_of_group(p, g);
        if (number < group.count()) turn.push_back(group.begin + number);
      }
      done += static_cast<long>(turn.size());
      parallel_for(static_cast<long>(turn.size()) * chunks, m.threads, [&](long task, int thread) {
        const long plane = turn[static_cast<size_t>(task / chunks)], block = weights.block_of(plane);
        const Plane& q = planes[static_cast<size_t>(plane)];
        const Range s = chunk(q.texels(), chunks, task % chunks);
        const Features f = features(q, in.planes[plane], object);
        m.real.unproject(q.grad_projected, m.stride, f, s.lo, s.hi, p.grad_planes ? weights.transposed(block) : nullptr, m.n1,
                         p.grad_planes ? const_cast<void*>(features(q, to.planes[plane], object).data) : nullptr,
                         weights.partial(block, task % chunks), m.scratch(thread));
      });
    }
  }
};

}  // namespace tcam
