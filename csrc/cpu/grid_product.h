// The features of a grid on the CPU, for planes that are multiplied. The maps have the planes' samples, one group of planes
// after the other, and ones where a group has no plane over a map's axes. The features of a voxel are h_0 = A * B * G, element
// by element; the voxel loop multiplies them by W_1.
#pragma once
#include "grid_maps.h"

namespace tcam {

template <class Real_>
class ProductGrid : public GridMaps<Real_> {
 public:
  using Real = Real_;
  using Base = GridMaps<Real>;
  using typename Base::Piece;

  ProductGrid(const Mlp<Real>& mlp, Carver& ws) : Base(mlp, ws) {
    long most = 0;
    for (int map = 0; map < 3; ++map)
      for (int g = 0; g < p.group_count; ++g) {
        Factors f = {map, g * static_cast<long>(p.channels), {}};
        for (const GridPlane<Real>& q : planes)
          if (q.map == map && p.planes[q.number].group == g) f.planes.push_back(&q);
        if (f.planes.size() > 1) most = std::max(most, this->capacity(map));
        if (!f.planes.empty()) factors_.push_back(f);
      }
    rest_reals_ = round_up(most, 16);
    if (m.backward && p.grad_planes) rest_ = ws.array<Real>(m.threads * rest_reals_);
  }

  void pack(const tcam_inputs&) {}
  void clear_gradients() {}
  void write_gradients(const tcam_gradients&, long) const {}

  // Samples an object's map B.
  void begin(const tcam_inputs& in, long object) {
    in_ = &in;
    object_ = object;
    this->place(in, object);
    sample([](int map) { return map == 1; }, 0, w.n[1]);
  }
  void begin_gradients(const tcam_gradients& to) {
    to_ = &to;
    zero(this->gradient(1), m.row_bytes(this->capacity(1)), m.threads);
    for (const GridPlane<Real>& q : planes)
      if (p.grad_planes) zero(gradient_of(q), p.channels * q.texels() * static_cast<long>(sizeof(Real)), m.threads);
  }

  // Samples the maps A and G of a slab, and returns them with B.
  Maps maps(const Piece& slab) {
    sample([](int map) { return map != 1; }, slab.i0, slab.ni);
    return this->whole(true);
  }
  BlockGradients gradients(const Piece&, long task) const {
    BlockGradients parts = this->parts_of(task);
    if (!p.grad_planes) parts.da = parts.db = parts.dg = nullptr;
    return parts;
  }
  void end_backward(const Piece& slab) {
    if (!p.grad_planes) return;
    this->combine(slab, [](int, long, long, const Real*) {});
    back_to_texels([](int map) { return map != 1; }, slab.i0, slab.ni);
  }
  void end(const tcam_inputs&, long, const tcam_gradients&) {
    if (p.grad_planes) back_to_texels([](int map) { return map == 1; }, 0, w.n[1]);
  }

 private:
  static constexpr long slice = 64 / sizeof(Real);  // channels of one thread: as many as fill a cache line
  using Base::m;
  using Base::p;
  using Base::planes;
  using Base::w;
  // The planes of a group over a map's axes, and the group's first column in the map's rows.
  struct Factors {
    int map;
    long column;
    std::vector<const GridPlane<Real>*> planes;
  };
  std::vector<Factors> factors_;
  long rest_reals_ = 0;
  Real* rest_ = nullptr;             // (threads, rest_reals_): the product of the other planes' samples
  const tcam_inputs* in_ = nullptr;  // of the round, as are the next two
  const tcam_gradients* to_ = nullptr;
  long object_ = 0;

  Real* gradient_of(const GridPlane<Real>& q) const { return static_cast<Real*>(to_->planes[q.number]) + q.object(object_); }
  const Real* channel_of(const GridPlane<Real>& q, long c) const {
    return static_cast<const Real*>(in_->planes[q.number]) + q.object(object_) + c * q.texels();
  }
  template <class Wanted>
  std::vector<const Factors*> factors_of(Wanted wanted) const {
    std::vector<const Factors*> chosen;
    for (const Factors& f : factors_)
      if (wanted(f.map)) chosen.push_back(&f);
    return chosen;
  }

  // Samples the planes of some maps at voxels x0 <= x < x0 + count.
  template <class Wanted>
  void sample(Wanted wanted, long x0, long count) {
    const long features = p.group_count * static_cast<long>(p.channels);
    for (int map = 0; map < 3; ++map)
      if (wanted(map))
        parallel_for(count * this->columns(map), m.threads, [&](long number, int) {
          Real* row = this->reals(this->row(map, number));
          std::fill_n(row, features, Real(1));
          std::fill(row + features, row + m.stride, Real(0));
        });
    this->each_channel(factors_of(wanted), slice, [&](const Factors& f, long c, int thread) {
      const long step = this->columns(f.map) * m.stride;
      Real* column = this->reals(this->row(f.map, 0)) + f.column + c;
      for (const GridPlane<Real>* q : f.planes)
        q->sample(channel_of(*q, c), x0, count, this->buffer(thread),
                  [&](long x, long y, Real v) { column[x * step + y * m.stride] *= v; });
    });
  }

  // From the gradients of `count` rows of some maps, the first of voxel x0, to the texels.
  template <class Wanted>
  void back_to_texels(Wanted wanted, long x0, long count) {
    this->each_channel(factors_of(wanted), slice, [&](const Factors& f, long c, int thread) {
      const long columns = this->columns(f.map), step = columns * m.stride;
      const Real* column = this->gradient_row(f.map, 0) + f.column + c;
      Real* rest = rest_ + thread * rest_reals_;
      for (const GridPlane<Real>* q : f.planes) {
        Real* to = gradient_of(*q) + c * q->texels();
        if (f.planes.size() == 1) {
          q->spread([&](long x, long y) { return column[x * step + y * m.stride]; }, x0, count, this->buffer(thread), to);
          continue;
        }
        for (long x = 0; x < count; ++x)
          for (long y = 0; y < columns; ++y) rest[x * columns + y] = column[x * step + y * m.stride];
        for (const GridPlane<Real>* other : f.planes)
          if (other != q)
            other->sample(channel_of(*other, c), x0, count, this->buffer(thread),
                          [&](long x, long y, Real v) { rest[x * columns + y] *= v; });
        q->spread([&](long x, long y) { return rest[x * columns + y]; }, x0, count, this->buffer(thread), to);
      }
    });
  }
};

}  // namespace tcam
