// decode_points, sample_points, and grids that do not separate (the product of the planes), on the CPU.
//
// A wave's points are walked in the order of a space-filling curve, so that neighbours read and write texels that are in cache.
// Points go in waves of up to 64 blocks of 384. A block gathers its points' texel rows, either of the planes projected through
// the first layer (which leaves a sum of 4 rows a plane) or of the planes themselves (then the first layer is a product), puts
// the first layer's outputs in rows, and hands them to the voxel loop as a grid of (1, points, 1). On the way back each block
// writes its rows' gradients; then a thread owns some channels of one plane and adds the wave's rows to the texels, points
// ascending: no atomics, and one order for every sum.
#pragma once
#include "../formulation.h"
#include "../maths/bilinear.h"
#include "mlp.h"

namespace tcam {

template <class Real>
class Points {
 public:
  Points(const tcam_problem& problem, bool backward, Carver& ws)
      : p(problem),
        grid(p.points < 0),
        objects(grid ? 1 : p.batch),
        count(grid ? (p.hi[0] - p.lo[0]) * (p.hi[1] - p.lo[1]) * (p.hi[2] - p.lo[2]) : p.points),
        m(problem, backward, std::min<long>(most_blocks, std::max<long>(1, (count + block_points - 1) / block_points)), ws),
        first(m, m.blocks, ws),
        projected(gathers_projections(p, objects, m.row_bytes(1))),
        samples(p.reduce == TCAM_SUM ? 1 : p.plane_count),
        channels(round_up(p.channels, m.real.columns)),
        pitch(projected ? m.stride : channels),
        taps(4 * p.plane_count) {
    long rows = 0;
    for (int q = 0; q < p.plane_count; ++q) {
      base_.push_back(rows * pitch);
      rows += objects * p.planes[q].rows * p.planes[q].columns;
    }
    texel_rows_ = rows;
    const long wave = wave_points(), bytes = m.real.real_bytes;
    auto reals = [&](long n) { return reinterpret_cast<Real*>(ws.take(n * bytes)); };
    texels_ = reals(rows * pitch);
    at_ = reinterpret_cast<int64_t*>(ws.take(wave * taps * 8));
    if (!grid) {
      order_ = reinterpret_cast<int32_t*>(ws.take(wave * 4));
      key_ = reinterpret_cast<uint16_t*>(ws.take(wave * 2));
      bucket_ = reinterpret_cast<int32_t*>(ws.take((keys + 1) * 4));
    }
    if (p.extra) own_ = reals(wave * p.extra);
    weight_ = reals(wave * taps);
    if (p.layers) {
      z_ = reals(wave * m.stride);
      zero_ = reals(m.stride);
    }
    if (!projected) sampled_ = reals(samples * wave * channels);
    if (p.reduce == TCAM_PRODUCT) product_ = reals(wave * channels);
    if (!backward) return;
    if (wants_texels()) grad_texels_ = reals(rows * pitch);
    if (p.layers) {
      delta_ = reals(wave * m.stride);
      bias_rows_ = reals(m.blocks * m.stride);
    }
    if (!projected) grad_sampled_ = reals(samples * wave * channels);
    if (p.reduce == TCAM_PRODUCT) grad_product_ = reals(wave * channels);
    if (p.grad_extra) grad_own_ = reals(wave * p.extra);
    if (!p.grad_points) return;
    by_row_ = reals(wave * taps);
    by_column_ = reals(wave * taps);
    dots_ = reals(wave * taps);
  }

  void forward(const tcam_inputs& in, void* out, const tcam_objective* objective, double* losses) {
    prepare(in);
    for (long object = 0; object < rounds(); ++object) {
      load_texels(in, object);
      m.clear_losses();
      for (long begin = 0; begin < count; begin += wave_points()) {
        const Wave wave = {in, out, objective, object, begin, std::min(wave_points(), count - begin)};
        sort(wave);
        parallel_for(m.blocks, m.threads, [&](long task, int thread) {
          const Range t = chunk(wave.points, m.blocks, task);
          if (t.lo == t.hi) return;
          place(wave, t);
          first_layer(wave, t, thread);
          if (p.layers)
            m.forward_block(maps(wave), {0, 1, t.lo, t.hi, 0, 1}, volume(wave), objective, task, thread);
          else
            write_features(wave, t);
        });
      }
      if (objective) losses[object] = m.total_loss();
    }
  }

  // `out` is the gradient of the output or, with an objective, its target.
  void backward(const tcam_inputs& in, const void* out, const tcam_objective* objective, double* losses,
                const tcam_gradients& to) {
    prepare(in);
    const bool per_object = objective && objective->per_object;
    for (long object = 0; object < rounds(); ++object) {
      if (object == 0 || per_object) {
        m.clear_gradients();
        first.clear_gradients();
        if (bias_rows_) zero(bias_rows_, m.row_bytes(m.blocks), m.threads);
      }
      load_texels(in, object);
      m.clear_losses();
      if (grad_texels_) zero(grad_texels_, texel_rows_ * pitch * m.real.real_bytes, m.threads);
      for (long begin = 0; begin < count; begin += wave_points()) {
        const Wave wave = {in, const_cast<void*>(out), objective, object, begin, std::min(wave_points(), count - begin)};
        sort(wave);
        parallel_for(m.blocks, m.threads, [&](long task, int thread) {
          const Range t = chunk(wave.points, m.blocks, task);
          if (t.lo == t.hi) return;
          place(wave, t);
          first_layer(wave, t, thread);
          if (p.layers) {
            std::memset(delta_ + t.lo * m.stride, 0, m.row_bytes(t.hi - t.lo));
            m.backward_block(maps(wave), {0, 1, t.lo, t.hi, 0, 1}, volume(wave), objective, delta_, nullptr, nullptr, task,
                             thread);
          }
          first_layer_back(wave, t, task, thread, to);
          if (p.grad_points) to_points(wave, t, to);
        });
        if (grad_texels_) scatter(wave);
      }
      if (objective) losses[object] = m.total_loss();
      if (grad_texels_) to_planes(in, object, to);
      if (p.layers && p.grad_decoder && (per_object || object == rounds() - 1)) {
        const long row = per_object ? object : 0;
        first.write_gradient(to, row);
        if (to.biases[0]) write_bias(static_cast<Real*>(to.biases[0]) + row * m.n1);
        m.write_gradients(to, row);
      }
    }
  }

 private:
  static constexpr long most_blocks = 64, block_points = 384;
  static constexpr int key_bits = 5, keys = 1 << 3 * key_bits;  // cells of the curve: 32 along each of three axes
  static constexpr long slice = 32;                             // channels that one thread adds to texels

  struct Wave {
    const tcam_inputs& in;
    void* out;
    const tcam_objective* objective;
    long object, begin, points;
  };

  const tcam_problem& p;
  const bool grid;
  const long objects, count;  // objects whose texels are held at once; points that are walked for them
  Mlp<Real> m;
  FirstLayer<Real> first;
  const bool projected;
  const long samples, channels;  // matrices of sampled features, their padded channels
  const GridBox box_ = grid_box(p);
  std::vector<Tap<Real>> voxel_taps_[2 * TCAM_MAX_PLANES];  // of a grid: for each plane those of its rows, then of its columns
  const long pitch, taps;                                   // of a texel row; texel rows that a point reads
  std::vector<long> base_;                                  // of each plane, in texels_
  long texel_rows_ = 0;
  int64_t* at_;
  int32_t *order_ = nullptr, *bucket_ = nullptr;  // of the wave: its points in the order of their keys
  uint16_t* key_ = nullptr;
  Real *own_ = nullptr, *grad_own_ = nullptr;  // features that points bring themselves, in that order
  Real *texels_, *weight_, *z_ = nullptr, *zero_ = nullptr, *sampled_ = nullptr, *product_ = nullptr;
  Real *grad_texels_ = nullptr, *delta_ = nullptr, *bias_rows_ = nullptr, *grad_sampled_ = nullptr, *grad_product_ = nullptr;
  Real *by_row_ = nullptr, *by_column_ = nullptr, *dots_ = nullptr;

  bool wants_texels() const { return p.grad_planes || (projected && p.grad_decoder); }
  long rounds() const { return grid ? p.batch : 1; }
  long wave_points() const { return m.blocks * block_points; }
  long texels(int q) const { return p.planes[q].rows * p.planes[q].columns; }
  Real* sample(Real* all, long s) const { return all + s * wave_points() * channels; }
  Real* plane_rows(Real* all, int q, long object) const {
    return all + base_[static_cast<size_t>(q)] + object * texels(q) * pitch;
  }

  void prepare(const tcam_inputs& in) {
    if (p.layers) {
      m.pack(in);
      zero(zero_, m.row_bytes(1), 1);
    }
    first.pack(in);
  }

  Features plane_features(const void* planes, int q, long object) const {
    return {static_cast<const Real*>(planes) + object * p.channels * texels(q), static_cast<long>(p.channels), 1, texels(q)};
  }
  Features rows(const Real* data) const { return {data, static_cast<long>(p.channels), channels, 1}; }
  Features own(const Real* rows, long block) const {
    return {rows + (block - planes_blocks()) * TCAM_MAX_WIDTH, first.width(block), static_cast<long>(p.extra), 1};
  }
  long place_of(long t) const { return order_ ? order_[t] : t; }  // in the wave, of the point walked as number t
  long planes_blocks() const { return p.reduce == TCAM_CONCAT ? p.plane_count : 1; }

  // f(plane, object's place in texels_, object, first texel, last) over chunks of all texels held.
  template <class F>
  void for_texels(long object, F f) {
    const long pieces = p.plane_count * objects * m.blocks;
    parallel_for(pieces, m.threads, [&](long task, int thread) {
      const int q = static_cast<int>(task / m.blocks / objects);
      const long slot = task / m.blocks % objects;
      const Range s = chunk(texels(q), m.blocks, task % m.blocks);
      f(q, slot, grid ? object : slot, s, thread);
    });
  }

  void load_texels(const tcam_inputs& in, long object) {
    if (grid) place_axes(in, object);
    for_texels(object, [&](int q, long slot, long of, Range s, int thread) {
      const Features f = plane_features(in.planes[q], q, of);
      Real* to = plane_rows(texels_, q, slot);
      if (projected) {
        m.real.project(f, s.lo, s.hi, first.weights(first.block_of(q)), m.n1, to, pitch, false, m.scratch(thread));
        return;
      }
      const Real* from = static_cast<const Real*>(f.data);
      for (long t = s.lo; t < s.hi; ++t)
        for (long c = 0; c < pitch; ++c) to[t * pitch + c] = c < p.channels ? from[c * texels(q) + t] : Real(0);
    });
  }

  // The order of the wave's points along a space-filling curve; equal keys keep theirs.
  void sort(const Wave& wave) {
    if (!order_) return;
    const Real* points = static_cast<const Real*>(wave.in.points) + wave.begin * p.axes;
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

  // The taps of the wave's points [t.lo, t.hi).
  void place(const Wave& wave, Range range) {
    if (grid) return place_voxels(wave, range);
    const Real* points = static_cast<const Real*>(wave.in.points);
    for (long t = range.lo; t < range.hi; ++t) {
      const long n = wave.begin + place_of(t);
      const long slot = wave.in.objects ? static_cast<long>(wave.in.objects[n]) : n / (p.points / p.batch);
      auto tap = [&](int axis, int64_t texels) {
        return coordinate_tap<Real>({static_cast<int>(texels), p.align_corners != 0, p.padding}, points[n * p.axes + axis]);
      };
      for (int q = 0; q < p.plane_count; ++q) {
        const tcam_plane& plane = p.planes[q];
        set_taps(t, q, slot, tap(plane.row_axis, plane.rows), tap(plane.column_axis, plane.columns));
      }
    }
  }
  void place_voxels(const Wave& wave, Range range) {
    const long wide = p.hi[1] - p.lo[1], deep = p.hi[2] - p.lo[2], n = wave.begin + range.lo;
    long at[3] = {n / (wide * deep), n / deep % wide, n % deep};
    for (long t = range.lo; t < range.hi; ++t) {
      for (int q = 0; q < p.plane_count; ++q) {
        const std::vector<Tap<Real>>* of = voxel_taps_ + 2 * q;
        set_taps(t, q, 0, of[0][static_cast<size_t>(at[p.planes[q].row_axis])],
                 of[1][static_cast<size_t>(at[p.planes[q].column_axis])]);
      }
      if (++at[2] < deep) continue;
      at[2] = 0;
      if (++at[1] == wide) at[1] = 0, ++at[0];
    }
  }
  void set_taps(long t, int q, long slot, const Tap<Real>& r, const Tap<Real>& c) {
    const long columns = static_cast<long>(p.planes[q].columns);
    const long begin = base_[static_cast<size_t>(q)] + slot * texels(q) * pitch, e = t * taps + 4 * q;
    const Real scale = static_cast<Real>(p.plane_scale);
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
  // Of a grid's voxels, along the axes of each plane.
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
  // Those of sample matrix s from point t on: of its plane, or of all.
  PointTaps taps_of(long s, long t) const {
    const long at = t * taps + 4 * s;
    return {at_ + at, weight_ + at, taps, samples == 1 ? taps : 4};
  }

  Maps maps(const Wave& wave) const { return {z_, zero_, zero_, 0, m.stride, 0, 0, 0, 0, wave.points, 1, m.stride, order_}; }
  Volume volume(const Wave& wave) const {
    const int dtype = wave.objective ? wave.objective->target_dtype : p.out_dtype;
    const long n_out = p.width[p.layers];
    if (!grid) return {wave.out, dtype, 1, n_out, wave.begin};
    return {static_cast<char*>(wave.out) + wave.object * n_out * count * dtype_bytes(dtype), dtype, count, 1, wave.begin};
  }

  // z_1 of the points or, without layers, their features.
  void first_layer(const Wave& wave, Range t, int thread) {
    const long n = t.hi - t.lo;
    if (projected) {
      const PointTaps all = {at_ + t.lo * taps, weight_ + t.lo * taps, taps, taps};
      m.real.gather(texels_, all, n, first.bias(), z_ + t.lo * m.stride, m.stride, m.stride);
    } else {
      for (long s = 0; s < samples; ++s)
        m.real.gather(texels_, taps_of(s, t.lo), n, nullptr, sample(sampled_, s) + t.lo * channels, channels, channels);
      if (product_)
        for (long e = t.lo * channels; e < t.hi * channels; ++e) {
          Real x = sampled_[e];
          for (long s = 1; s < samples; ++s) x *= sample(sampled_, s)[e];
          product_[e] = x;
        }
      if (!p.layers) return;
      if (p.noise_std != 0) add_noise(wave, t);
      for (long x = t.lo; x < t.hi; ++x) std::memcpy(z_ + x * m.stride, first.bias(), m.row_bytes(1));
      for (long b = 0; b < planes_blocks(); ++b)
        m.real.project(rows(product_ ? product_ : sample(sampled_, b)), t.lo, t.hi, first.weights(b), m.n1, z_, m.stride, true,
                       m.scratch(thread));
    }
    const Real* brought = static_cast<const Real*>(wave.in.extra) + first_extra(wave);
    for (long x = t.lo; own_ && x < t.hi; ++x)
      std::memcpy(own_ + x * p.extra, brought + place_of(x) * p.extra, static_cast<size_t>(p.extra) * sizeof(Real));
    for (long b = planes_blocks(); b < first.blocks(); ++b)
      m.real.project(own(own_, b), t.lo, t.hi, first.weights(b), m.n1, z_, m.stride, true, m.scratch(thread));
  }

  // To what the planes' blocks of the first layer multiply: noise of a point's features.
  void add_noise(const Wave& wave, Range range) {
    float noise[TCAM_MAX_PLANES * TCAM_MAX_WIDTH + 64] = {};  // rows are read to their padded ends
    const long c = static_cast<long>(p.channels), features = planes_blocks() * c;
    const Real std = static_cast<Real>(p.noise_std);
    for (long t = range.lo; t < range.hi; ++t) {
      m.real.normals(key_of(wave, wave.begin + place_of(t)), features, 0, noise_blocks(features), noise);
      for (long b = 0; b < planes_blocks(); ++b) {
        Real* row = (product_ ? product_ : sample(sampled_, b)) + t * channels;
        if constexpr (sizeof(Real) == sizeof(float))
          m.real.add_scaled(row, noise + b * c, p.noise_std, channels);  // no product reads beyond c
        else
          for (long e = 0; e < c; ++e) row[e] += std * static_cast<Real>(noise[b * c + e]);
      }
    }
  }
  NoiseKey key_of(const Wave& wave, long n) const {
    NoiseKey key = {p.noise_seed, static_cast<uint64_t>(n), static_cast<uint32_t>(wave.object), 0};
    if (grid) {
      key.number = static_cast<uint64_t>(box_.number(n));
    } else if (wave.in.objects) {
      key.object = static_cast<uint32_t>(wave.in.objects[n]);
    } else {
      const long each = p.points / p.batch;
      key.object = static_cast<uint32_t>(n / each), key.number = static_cast<uint64_t>(n % each);
    }
    return key;
  }
  long first_extra(const Wave& wave) const { return ((grid ? wave.object * count : 0) + wave.begin) * p.extra; }

  // From delta_1 (without layers: from the gradient of the features) to the gradients of the samples, of a point's own features
  // and of the first layer.
  void first_layer_back(const Wave& wave, Range t, long task, int thread, const tcam_gradients& to) {
    if (p.layers && p.grad_decoder)
      for (long x = t.lo; x < t.hi; ++x) m.real.add_scaled(bias_rows_ + task * m.stride, delta_ + x * m.stride, 1.0, m.stride);
    const bool samples_wanted = p.grad_planes || p.grad_points;
    if (!projected) {
      Real* first_gradient = grad_product_ ? grad_product_ : grad_sampled_;
      if (p.layers) {
        for (long b = 0; b < planes_blocks(); ++b) {
          Real* grad = first_gradient + b * wave_points() * channels;
          m.real.unproject(delta_, m.stride, rows(product_ ? product_ : sample(sampled_, b)), t.lo, t.hi,
                           samples_wanted ? first.transposed(b) : nullptr, m.n1, samples_wanted ? grad : nullptr,
                           first.partial(b, task), m.scratch(thread));
          if (samples_wanted) clear_padding(grad, t);
        }
      } else {
        read_features(wave, t, first_gradient);
      }
      if (grad_product_ && samples_wanted)
        for (long e = t.lo * channels; e < t.hi * channels; ++e)
          for (long s = 0; s < samples; ++s) {
            Real x = grad_product_[e];
            for (long other = 0; other < samples; ++other)
              if (other != s) x *= sample(sampled_, other)[e];
            sample(grad_sampled_, s)[e] = x;
          }
    }
    for (long b = planes_blocks(); p.layers && b < first.blocks(); ++b)
      m.real.unproject(delta_, m.stride, own(own_, b), t.lo, t.hi, grad_own_ ? first.transposed(b) : nullptr, m.n1,
                       grad_own_ ? const_cast<void*>(own(grad_own_, b).data) : nullptr, first.partial(b, task),
                       m.scratch(thread));
    Real* gradient = static_cast<Real*>(to.extra) + first_extra(wave);
    for (long x = t.lo; grad_own_ && x < t.hi; ++x)
      std::memcpy(gradient + place_of(x) * p.extra, grad_own_ + x * p.extra, static_cast<size_t>(p.extra) * sizeof(Real));
  }
  void clear_padding(Real* rows, Range t) const {
    for (long x = t.lo; x < t.hi; ++x)
      for (long c = p.channels; c < channels; ++c) rows[x * channels + c] = 0;
  }

  // Without layers the output is (points, features), one sample matrix after the other.
  template <class F>
  void each_feature(const Wave& wave, Range t, F f) {
    const long matrices = planes_blocks(), c = p.channels;
    for (long x = t.lo; x < t.hi; ++x)
      for (long b = 0; b < matrices; ++b)
        for (long e = 0; e < c; ++e)
          f(((wave.begin + place_of(x)) * matrices + b) * c + e, b * wave_points() * channels + x * channels + e);
  }
  void write_features(const Wave& wave, Range t) {
    const Real* from = product_ ? product_ : sampled_;
    each_feature(wave, t, [&](long out, long at) { Elements<Real>::write(wave.out, p.out_dtype, out, from[at]); });
  }
  void read_features(const Wave& wave, Range t, Real* to) {
    each_feature(wave, t, [&](long out, long at) { to[at] = Elements<Real>::read(wave.out, p.out_dtype, out); });
    for (long b = 0; b < planes_blocks(); ++b) clear_padding(to + b * wave_points() * channels, t);
  }

  // Gradients of the coordinates: what the samples change by when the weights of their taps do.
  void to_points(const Wave& wave, Range range, const tcam_gradients& to) {
    const long n = range.hi - range.lo;
    if (projected)
      m.real.dot(texels_, {at_ + range.lo * taps, nullptr, taps, taps}, n, delta_ + range.lo * m.stride, m.stride, m.stride,
                 dots_ + range.lo * taps);
    else
      for (long s = 0; s < samples; ++s)
        m.real.dot(texels_, taps_of(s, range.lo), n, sample(grad_sampled_, s) + range.lo * channels, channels, channels,
                   dots_ + range.lo * taps + 4 * s);
    Real* out = static_cast<Real*>(to.points) + wave.begin * p.axes;
    for (long t = range.lo; t < range.hi; ++t) {
      Real sum[TCAM_MAX_AXES] = {};
      for (int q = 0; q < p.plane_count; ++q)
        for (int x = 0; x < 4; ++x) {
          const long e = t * taps + 4 * q + x;
          sum[p.planes[q].row_axis] += dots_[e] * by_row_[e];
          sum[p.planes[q].column_axis] += dots_[e] * by_column_[e];
        }
      for (int a = 0; a < p.axes; ++a) out[place_of(t) * p.axes + a] = sum[a];
    }
  }

  void scatter(const Wave& wave) {
    const long slices = (pitch + slice - 1) / slice;
    parallel_for(p.plane_count * slices, m.threads, [&](long task, int) {
      const long q = task / slices, c0 = task % slices * slice;
      const PointTaps of = {at_ + 4 * q, weight_ + 4 * q, taps, 4};
      const Real* delta = projected ? delta_ : sample(grad_sampled_, samples == 1 ? 0 : q);
      m.real.scatter(grad_texels_, of, wave.points, delta, projected ? m.stride : channels, c0, std::min(c0 + slice, pitch));
    });
  }

  void to_planes(const tcam_inputs& in, long object, const tcam_gradients& to) {
    // Objects, and planes that share a block of weights, also share its partial sums: one after the other.
    for (long slot = 0; slot < objects; ++slot)
      for (int q = 0; q < p.plane_count; ++q) {
        const long of = grid ? object : slot, block = first.block_of(q);
        Real* out =
            p.grad_planes ? const_cast<Real*>(static_cast<const Real*>(plane_features(to.planes[q], q, of).data)) : nullptr;
        const Real* grad = plane_rows(grad_texels_, q, slot);
        parallel_for(m.blocks, m.threads, [&](long task, int thread) {
          const Range s = chunk(texels(q), m.blocks, task);
          if (projected)
            m.real.unproject(grad, pitch, plane_features(in.planes[q], q, of), s.lo, s.hi,
                             out ? first.transposed(block) : nullptr, m.n1, out, first.partial(block, task), m.scratch(thread));
          else
            for (long t = s.lo; t < s.hi; ++t)
              for (long c = 0; c < p.channels; ++c) out[c * texels(q) + t] = grad[t * pitch + c];
        });
      }
  }

  void write_bias(Real* bias) const {
    for (long r = 0; r < m.n1; ++r) {
      Real sum = 0;
      for (long q = 0; q < m.blocks; ++q) sum += bias_rows_[q * m.stride + r];
      bias[r] = sum;
    }
  }
};

}  // namespace tcam
