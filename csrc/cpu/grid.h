// The first layer of a grid on the CPU, for planes that are concatenated or added, so that the first layer separates into maps
// over pairs of axes: z_1 = A + B + G. Planes over the same pair of axes add up in one map.
//
// Sampling and the product with W_1 commute. A plane is either projected, its texels times its block of W_1, and then sampled,
// or, if its texels are many for the grid, sampled and then projected. Backward takes the adjoint steps in reverse order.
#pragma once
#include "first_weights.h"
#include "grid_maps.h"

namespace tcam {

constexpr long texel_chunks = 16;  // chunks of a plane's texels or of a map's rows; fixed, so that sums have one order

template <class Real_>
class Grid : public GridMaps<Real_> {
 public:
  using Real = Real_;
  using Base = GridMaps<Real>;
  using typename Base::Piece;

  Grid(const Mlp<Real>& mlp, Carver& ws) : Base(mlp, ws), weights(m, texel_chunks, w.n[1], ws) {
    for (const GridPlane<Real>& q : planes) {
      Steps s;
      s.sample_first = samples_first(p, q.number);
      const long reals = p.channels * this->capacity(q.map);
      if (s.sample_first)
        s.features = ws.array<Real>(reals);
      else
        s.projected = ws.take(m.row_bytes(q.texels()));
      if (m.backward && s.sample_first) s.grad_features = ws.array<Real>(reals);
      if (m.backward && !s.sample_first) {
        s.grad_projected = ws.take(m.row_bytes(q.texels()));
        s.grad_rows = ws.take(m.row_bytes(q.x_texels() * w.n[q.y_axis]));
      }
      steps.push_back(s);
    }
  }

  void pack(const tcam_inputs& in) { weights.pack(in); }
  void clear_gradients() { weights.clear_gradients(); }
  void write_gradients(const tcam_gradients& to, long object) const { weights.write_gradients(to, object); }

  // Projects an object's planes and computes the map B.
  void begin(const tcam_inputs& in, long object) {
    in_ = &in;
    object_ = object;
    this->place(in, object);
    const long chunks = weights.chunks;
    parallel_for(p.plane_count * chunks, m.threads, [&](long task, int thread) {
      const GridPlane<Real>& q = plane(task / chunks);
      if (steps_of(q).sample_first) return;
      each_run(q, task % chunks, [&](Range s) {
        m.real.project(texels_of(q, in_->planes[q.number]), s.lo, s.hi, weights.weights(weights.block_of(q.number)), m.n1,
                       steps_of(q).projected, m.stride, false, m.scratch(thread));
      });
    });
    sample([](int map) { return map == 1; }, 0, w.n[1]);
    parallel_for(w.n[1], m.threads, [&](long j, int thread) { map_row(1, j, j, nullptr, thread); });
  }
  void begin_gradients(const tcam_gradients& to) {
    to_ = &to;
    zero(this->gradient(1), m.row_bytes(this->capacity(1)), m.threads);
    for (const GridPlane<Real>& q : planes) {
      const Range rows = q.used_rows(), columns = q.used_columns(), x = q.x_used;
      const bool whole = (rows.hi - rows.lo) * (columns.hi - columns.lo) == q.texels();
      if (!steps_of(q).sample_first)
        zero(steps_of(q).grad_rows + m.row_bytes(x.lo * w.n[q.y_axis]), m.row_bytes((x.hi - x.lo) * w.n[q.y_axis]), m.threads);
      if (p.grad_planes && (steps_of(q).sample_first || !whole))
        zero(gradient_of(q), p.channels * q.texels() * static_cast<long>(sizeof(Real)), m.threads);
    }
  }

  // Computes the maps A and G of a slab, and returns them with B.
  Maps maps(const Piece& slab) {
    sample([](int map) { return map != 1; }, slab.i0, slab.ni);
    parallel_for(2 * slab.ni, m.threads, [&](long task, int thread) {
      const long i = task / 2;
      map_row(task % 2 ? 2 : 0, slab.i0 + i, i, task % 2 ? nullptr : weights.bias(), thread);  // A includes b_1
    });
    return this->whole(false);
  }
  BlockGradients gradients(const Piece&, long task) const { return this->parts_of(task); }

  // Takes the gradients of A and G back to the planes.
  void end_backward(const Piece& slab) {
    this->combine(slab, [&](int map, long i, long x, const Real* total) {
      for (const GridPlane<Real>& q : planes)
        if (q.map == map && !steps_of(q).sample_first)
          spread(q.x_taps[static_cast<size_t>(slab.i0 + i)], reals(steps_of(q).grad_rows) + x * m.stride,
                 this->columns(map) * m.stride, total);
      if (map == 0) weights.add_bias_gradient(x, total);
    });
    for (const GridPlane<Real>& q : planes)
      if (q.map != 1) back_through_samples(q, slab.i0, slab.ni);
  }

  // Takes the gradient of B back to the planes, and finishes the gradients of the planes and of W_1.
  void end(const tcam_inputs&, long, const tcam_gradients&) {
    for (const GridPlane<Real>& q : planes)
      if (q.map == 1) back_through_samples(q, 0, w.n[1]);
    gradients_to_texels();
    unproject();
  }

 private:
  using Base::m;
  using Base::p;
  using Base::planes;
  using Base::reals;
  using Base::w;
  // How a plane's part of a map is computed, and the arrays for it. Projected first: (texels), the same, (texels of x, voxels
  // of y), n_1 each. Sampled first: (C, rows of the map), twice.
  struct Steps {
    bool sample_first;
    char *projected = nullptr, *grad_projected = nullptr, *grad_rows = nullptr;
    Real *features = nullptr, *grad_features = nullptr;
  };
  FirstWeights<Real> weights;
  std::vector<Steps> steps;
  const tcam_inputs* in_ = nullptr;  // of the round, as are the next two
  const tcam_gradients* to_ = nullptr;
  long object_ = 0;

  const GridPlane<Real>& plane(long q) const { return planes[static_cast<size_t>(q)]; }
  const Steps& steps_of(const GridPlane<Real>& q) const { return steps[static_cast<size_t>(q.number)]; }
  Features texels_of(const GridPlane<Real>& q, const void* data) const {
    return {reals(data) + q.object(object_), static_cast<long>(p.channels), 1, q.texels()};
  }
  Features samples_of(const GridPlane<Real>& q, const Real* data) const {
    return {data, static_cast<long>(p.channels), 1, this->capacity(q.map)};
  }
  Real* gradient_of(const GridPlane<Real>& q) const { return static_cast<Real*>(to_->planes[q.number]) + q.object(object_); }

  // Calls f(range) for the ranges of texels of a chunk of those that the box reads.
  template <class F>
  void each_run(const GridPlane<Real>& q, long number, F f) const {
    const Range used = q.used_rows(), columns = q.used_columns();
    const Range rows = chunk(used.hi - used.lo, weights.chunks, number);
    if (columns.hi - columns.lo == q.columns) return f(Range{(used.lo + rows.lo) * q.columns, (used.lo + rows.hi) * q.columns});
    for (long r = used.lo + rows.lo; r < used.lo + rows.hi; ++r)
      f(Range{r * q.columns + columns.lo, r * q.columns + columns.hi});
  }

  // Samples the planes that are sampled first, of some maps, at voxels x0 <= x < x0 + count.
  template <class Wanted>
  void sample(Wanted wanted, long x0, long count) {
    std::vector<const GridPlane<Real>*> chosen;
    for (const GridPlane<Real>& q : planes)
      if (steps_of(q).sample_first && wanted(q.map)) chosen.push_back(&q);
    this->each_channel(chosen, 1, [&](const GridPlane<Real>& q, long c, int thread) {
      const long columns = this->columns(q.map);
      Real* to = steps_of(q).features + c * this->capacity(q.map);
      q.sample(reals(in_->planes[q.number]) + q.object(object_) + c * q.texels(), x0, count, this->buffer(thread),
               [&](long x, long y, Real v) { to[x * columns + y] = v; });
    });
  }

  // Voxel x's row of a map, to row `to` of the map's array: bias (null: 0) + the sum of the map's planes.
  void map_row(int map, long x, long to, const void* bias, int thread) {
    const long columns = this->columns(map);
    char* out = this->row(map, to * columns);
    bool started = false;
    for (const GridPlane<Real>& q : planes) {
      if (q.map != map || steps_of(q).sample_first) continue;
      const Tap<double>& t = q.x_taps[static_cast<size_t>(x)];
      for (long y = 0; y < columns; ++y) {
        const Tap<double>& u = q.y_taps[static_cast<size_t>(y)];
        auto row = [&](long a, long b) { return steps_of(q).projected + m.row_bytes(a * q.x_step + b * q.y_step); };
        const void* src[4] = {row(t.lo, u.lo), row(t.lo, u.hi), row(t.hi, u.lo), row(t.hi, u.hi)};
        const double k[4] = {t.w_lo * u.w_lo, t.w_lo * u.w_hi, t.w_hi * u.w_lo, t.w_hi * u.w_hi};
        m.real.bilinear_row(src, k, started ? out + m.row_bytes(y) : bias, out + m.row_bytes(y), m.stride);
      }
      started = true;
    }
    for (long y = 0; !started && y < columns; ++y) {
      if (bias)
        std::memcpy(out + m.row_bytes(y), bias, m.row_bytes(1));
      else
        std::memset(out + m.row_bytes(y), 0, m.row_bytes(1));
    }
    for (const GridPlane<Real>& q : planes) {
      if (q.map != map || !steps_of(q).sample_first) continue;
      const Features samples = samples_of(q, steps_of(q).features);
      m.real.project(samples, to * columns, (to + 1) * columns, weights.weights(weights.block_of(q.number)), m.n1,
                     this->row(map, 0), m.stride, true, m.scratch(thread));
    }
  }

  // From the gradients of `count` rows of a map, the first of voxel x0, to the texels of a plane that is sampled first, and to
  // the partial sums of W_1.
  void back_through_samples(const GridPlane<Real>& q, long x0, long count) {
    const Steps& s = steps_of(q);
    if (!s.sample_first) return;
    const long columns = this->columns(q.map), block = weights.block_of(q.number);
    parallel_for(weights.chunks, m.threads, [&](long task, int thread) {
      const Range rows = chunk(count * columns, weights.chunks, task);
      m.real.unproject(this->gradient(q.map), m.stride, samples_of(q, s.features), rows.lo, rows.hi,
                       p.grad_planes ? weights.transposed(block) : nullptr, m.n1, s.grad_features, weights.partial(block, task),
                       m.scratch(thread));
    });
    if (!p.grad_planes) return;
    parallel_for(p.channels, m.threads, [&](long c, int thread) {
      const Real* from = s.grad_features + c * this->capacity(q.map);
      q.spread([&](long x, long y) { return from[x * columns + y]; }, x0, count, this->buffer(thread),
               gradient_of(q) + c * q.texels());
    });
  }

  // The adjoint of a tap: adds `from` (n_1) times the tap's weights to rows t.lo and t.hi, `step` reals from row to row.
  void spread(const Tap<double>& t, Real* to, long step, const Real* from) {
    m.real.add_scaled(to + t.lo * step, from, t.w_lo, m.stride);
    m.real.add_scaled(to + t.hi * step, from, t.w_hi, m.stride);
  }

  // Spreads dB along j to the rows of the planes that are projected first, then all their grad_rows along y to grad_projected.
  void gradients_to_texels() {
    parallel_for(w.n[2], m.threads, [&](long k, int) {
      for (const GridPlane<Real>& q : planes)
        for (long j = 0; q.map == 1 && !steps_of(q).sample_first && j < w.n[1]; ++j)
          spread(q.x_taps[static_cast<size_t>(j)], reals(steps_of(q).grad_rows) + k * m.stride, w.n[2] * m.stride,
                 this->gradient_row(1, j * w.n[2] + k));
    });
    for (const GridPlane<Real>& q : planes) {  // then along the columns
      const Steps& s = steps_of(q);
      if (s.sample_first) continue;
      const long voxels = w.n[q.y_axis], step = q.y_step * m.stride;
      parallel_for(q.x_used.hi - q.x_used.lo, m.threads, [&](long number, int) {
        const long x = q.x_used.lo + number;
        Real* texels = reals(s.grad_projected) + x * q.x_step * m.stride;
        for (long y = q.y_used.lo; y < q.y_used.hi; ++y) std::fill_n(texels + y * step, m.stride, Real(0));
        for (long y = 0; y < voxels; ++y)
          spread(q.y_taps[static_cast<size_t>(y)], texels, step, reals(s.grad_rows) + (x * voxels + y) * m.stride);
      });
    }
  }

  // Computes the gradients of the planes that are projected first from grad_projected, and adds to the partial sums of W_1.
  void unproject() {
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
        const GridPlane<Real>& q = plane(turn[static_cast<size_t>(task / chunks)]);
        const long block = weights.block_of(q.number);
        if (steps_of(q).sample_first) return;
        each_run(q, task % chunks, [&](Range s) {
          m.real.unproject(steps_of(q).grad_projected, m.stride, texels_of(q, in_->planes[q.number]), s.lo, s.hi,
                           p.grad_planes ? weights.transposed(block) : nullptr, m.n1, p.grad_planes ? gradient_of(q) : nullptr,
                           weights.partial(block, task % chunks), m.scratch(thread));
        });
      });
    }
  }
};

}  // namespace tcam
