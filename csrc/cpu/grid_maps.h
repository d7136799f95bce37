// The maps of a grid on the CPU: A (i, j), B (j, k) and G (i, k), from which the voxel loop combines the row of voxel (i, j,
// k).
//
// The box is cut into slabs of i, and a slab into blocks of (j, k). Backward adds the gradients of a block's rows to maps of
// the block's own, which are combined in block order.
#pragma once
#include <cmath>

#include "grid_plane.h"

namespace tcam {

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
    const long row = round_up(map_width(p), real.columns) * real.real_bytes;
    long per_i = (n[1] + n[2]) * row;
    if (backward) per_i += (k_chunks * n[1] + j_chunks * n[2]) * row;
    slab = std::max<long>(1, std::min(n[0], max_bytes / std::max<long>(per_i, 1)));
  }
};

// What Grid (sums of planes) and ProductGrid (products) share, as parts of a Decode (decode.cpp).
template <class Real_>
class GridMaps {
 public:
  using Real = Real_;
  struct Piece {  // a slab: i0 to i0 + ni
    long i0, ni;
  };

  // The number of blocks of a slab.
  static long blocks(const tcam_problem& problem, bool backward) {
    const Partition w(problem, backward);
    return w.j_chunks * w.k_chunks;
  }

  template <class F>
  void each_piece(F f) {
    for (long i0 = 0; i0 < w.n[0]; i0 += w.slab) f(Piece{i0, std::min(w.slab, w.n[0] - i0)});
  }
  long rounds() const { return static_cast<long>(p.batch); }
  Block block(const Piece& slab, long task) const {
    const Range j = chunk(w.n[1], w.j_chunks, task / w.k_chunks), k = chunk(w.n[2], w.k_chunks, task % w.k_chunks);
    return {0, slab.ni, j.lo, j.hi, k.lo, k.hi};
  }
  long first_voxel(const Piece& slab) const { return slab.i0 * w.n[1] * w.n[2]; }
  void forward_block(const Piece&, const Volume&, long, int) {}
  void begin_backward(const Piece&) {
    for (int map : {0, 2}) zero(gradient(map), parts(map) * m.row_bytes(capacity(map)), m.threads);
  }
  void backward_block(const Piece&, const Volume&, long, int, const tcam_gradients&) {}

 protected:
  const Mlp<Real>& m;
  const tcam_problem& p;
  const Partition w;
  std::vector<GridPlane<Real>> planes;

  GridMaps(const Mlp<Real>& mlp, Carver& ws) : m(mlp), p(m.p), w(p, m.backward) {
    for (int q = 0; q < p.plane_count; ++q) planes.emplace_back(p, q);
    for (int map = 0; map < 3; ++map) maps_[map] = ws.take(m.row_bytes(capacity(map)));
    for (int map = 0; m.backward && map < 3; ++map) gradients_[map] = ws.take(parts(map) * m.row_bytes(capacity(map)));
    for (const GridPlane<Real>& q : planes) buffer_reals_ = std::max(buffer_reals_, round_up(q.columns, 16));
    buffers_ = ws.array<Real>(m.threads * buffer_reals_);
  }

  static Real* reals(char* p) { return reinterpret_cast<Real*>(p); }
  static const Real* reals(const void* p) { return static_cast<const Real*>(p); }
  // Of a map: its voxels along the second axis, and its most rows; the rows are (i or j, j or k).
  long columns(int map) const { return map == 0 ? w.n[1] : w.n[2]; }
  long capacity(int map) const { return (map == 1 ? w.n[1] : w.slab) * columns(map); }
  char* row(int map, long number) const { return maps_[map] + m.row_bytes(number); }
  // The gradients of a map: as many parts as there are blocks that share a row of it, each as large as the map.
  long parts(int map) const { return map == 0 ? w.k_chunks : map == 1 ? 1 : w.j_chunks; }
  char* gradient(int map) const { return gradients_[map]; }
  Real* gradient_row(int map, long number) const { return reals(gradients_[map]) + number * m.stride; }
  // A thread's buffer of as many reals as the widest plane has columns.
  Real* buffer(int thread) const { return buffers_ + thread * buffer_reals_; }
  // Calls f(item, channel, thread) in parallel for all channels of some items; a thread takes `slice` of them at a time.
  template <class Item, class F>
  void each_channel(const std::vector<const Item*>& items, long slice, F f) {
    const long channels = static_cast<long>(p.channels), slices = (channels + slice - 1) / slice;
    parallel_for(static_cast<long>(items.size()) * slices, m.threads, [&](long task, int thread) {
      const long c0 = task % slices * slice;
      for (long c = c0; c < std::min(c0 + slice, channels); ++c) f(*items[static_cast<size_t>(task / slices)], c, thread);
    });
  }

  void place(const tcam_inputs& in, long object) {
    if (!in.bounds && object) return;
    for (GridPlane<Real>& q : planes) q.place(in.bounds ? in.bounds + object * 6 : nullptr);
  }
  Maps whole(bool multiply) const {
    const long s = m.stride, wide = w.n[1], deep = w.n[2];
    return {maps_[0], maps_[1], maps_[2], wide * s, s, deep * s, s, deep * s, s, wide, deep, s, nullptr, multiply};
  }
  // A block's parts of the gradients.
  BlockGradients parts_of(long task) const {
    const long kc = task % w.k_chunks, jc = task / w.k_chunks;
    return {gradient_row(0, kc * capacity(0)), gradient_row(1, 0), gradient_row(2, jc * capacity(2)), nullptr};
  }
  // Adds up the parts of dA and dG in block order, into the first part. Calls f(map, i, x, row) for each row, (i, x) of the
  // slab, on one thread for each (map, x), with i in ascending order.
  template <class F>
  void combine(const Piece& slab, F f) {
    parallel_for(w.n[1] + w.n[2], m.threads, [&](long task, int) {
      const int map = task < w.n[1] ? 0 : 2;
      const long x = map ? task - w.n[1] : task;
      for (long i = 0; i < slab.ni; ++i) {
        const long number = i * columns(map) + x;
        Real* total = gradient_row(map, number);
        for (long q = 1; q < parts(map); ++q)
          m.real.add_scaled(total, gradient_row(map, q * capacity(map) + number), 1.0, m.stride);
        f(map, i, x, total);
      }
    });
  }

 private:
  char* maps_[3];
  char* gradients_[3] = {nullptr, nullptr, nullptr};  // no two blocks of a slab write the same row
  long buffer_reals_ = 0;
  Real* buffers_;
};

}  // namespace tcam
