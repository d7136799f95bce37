// The voxel loop, compiled once per instruction set (setup.py defines TCAM_ISA, TCAM_VECTOR_BYTES and the flags) under the
// rules of simd.h.
//
// A tile is up to 96 voxels (rows) by one layer's width (columns), kept in L1 and L2 with a fixed row pitch. A layer multiplies
// the tile by a packed matrix in blocks of 6 rows (AVX-512: 12; AMX: 32) x 2 vectors, and activates a block before storing it.
// The problem alone fixes the order of every sum: along the contraction for a product, by ascending voxel for a gradient.
#include "normals.h"
#include "texels.h"
#include "voxel_tile.h"

namespace tcam {
namespace TCAM_ISA {

// ---- the layers ------------------------------------------------------------------------

template <class N>
TCAM_INLINE void activate(Hidden<double> act, typename N::Vec z, typename N::Word* row, typename N::Real* slope_row, long c) {
  typedef Maths<typename N::Arith> A;
  const typename N::Vec y = A::value(act, z);
  N::put(row, c, y);
  if (slope_row) store(slope_row + c, A::slope(act, z, y));
}

// Activates a register tile out of line: the smooth activations have long code, which would spill the tile in the caller.
template <class N, long pitch>
__attribute__((noinline)) static void activate_tile(Hidden<double> act, const Tile<N>& t, typename N::Word* h,
                                                    typename N::Real* slope) {
  for (int r = 0; r < N::rows; ++r)
    for (int v = 0; v < register_vectors; ++v)
      activate<N>(act, t.v[r][v], h + r * pitch, slope ? slope + r * pitch : nullptr, v * N::lanes);
}

// Adds the part of a layer that reads the features to a register tile, out of line as above. row: the tile's first voxel;
// column: its first column in the maps.
template <class N>
__attribute__((noinline)) static void add_features(const Maps& maps, const Walk& walk, long row, long count, long column,
                                                   Tile<N>& t) {
  typedef typename N::Vec Vec;
  typedef typename N::Real Real;
  for (int r = 0; r < N::rows && row + r < count; ++r)
    for (int v = 0; v < register_vectors; ++v) {
      const long c = column + v * N::lanes;
      t.v[r][v] += load<Vec>(static_cast<const Real*>(maps.a) + walk.a[row + r] + c) +
                   (load<Vec>(static_cast<const Real*>(maps.b) + walk.b[row + r] + c) +
                    load<Vec>(static_cast<const Real*>(maps.g) + walk.g[row + r] + c));
    }
}

// The activations of layers 1..layers-1 for a tile of `count` voxels. Rows from count on are zero in layer 1, and what follows
// from that above it. With one layer, z receives the pre-activation.
template <class N, long pitch>
TCAM_INLINE void hidden_layers(const Decoder& d, const Maps& maps, const Walk& walk, long count, long rows,
                               Scratch<N, pitch>& s, bool backward) {
  typedef typename N::Vec Vec;
  typedef typename N::Real Real;
  typedef Maths<typename N::Arith> A;
  constexpr Hidden<double> relu = {Activation::relu, 0};
  const Real *a = static_cast<const Real*>(maps.a), *b = static_cast<const Real*>(maps.b),
             *g = static_cast<const Real*>(maps.g);
  if (d.layers == 1) {
    for (long t = 0; t < count; ++t)
      for (long c = 0; c < d.width[1]; ++c) s.z[c * max_tile + t] = a[walk.a[t] + c] + (b[walk.b[t] + c] + g[walk.g[t] + c]);
    return;
  }
  const long n1 = round_up(d.width[1], columns_of<N>());
  for (long t = 0; t < rows; ++t) {
    typename N::Word* row = s.h[1] + t * pitch;
    Real* slope_row = backward && s.slope[1] ? s.slope[1] + t * pitch : nullptr;
    if (t >= count) {
      for (long c = 0; c < n1; c += N::lanes) {
        N::put(row, c, Vec{});
        if (slope_row) store(slope_row + c, Vec{});
      }
      continue;
    }
    const Real *at = a + walk.a[t], *bt = b + walk.b[t], *gt = g + walk.g[t];
    if (maps.multiply)  // layer 1 of the loop is the identity
      for (long c = 0; c < n1; c += N::lanes) N::put(row, c, load<Vec>(at + c) * (load<Vec>(bt + c) * load<Vec>(gt + c)));
    else if (d.activation[1].kind == Activation::relu)
      for (long c = 0; c < n1; c += N::lanes)
        N::put(row, c, A::value(relu, load<Vec>(at + c) + (load<Vec>(bt + c) + load<Vec>(gt + c))));
    else
      for (long c = 0; c < n1; c += N::lanes)
        activate<N>(d.activation[1], load<Vec>(at + c) + (load<Vec>(bt + c) + load<Vec>(gt + c)), row, slope_row, c);
  }
  for (int l = 2; l < d.layers; ++l) {
    typename N::Word* out = s.h[l];
    Real* slope = backward ? s.slope[l] : nullptr;
    auto finish = [&](const Tile<N>& t, long r, long c) __attribute__((always_inline)) {
      // Columns are counted in reals and rows in words of `pitch`; a word row holds its reals in order.
      if (d.activation[l].kind == Activation::relu) {
#pragma GCC unroll 16
        for (int i = 0; i < N::rows; ++i)
#pragma GCC unroll 4
          for (int v = 0; v < register_vectors; ++v) N::put(out + (r + i) * pitch, c + v * N::lanes, A::value(relu, t.v[i][v]));
      } else {
        activate_tile<N, pitch>(d.activation[l], t, out + r * pitch + c / N::pack, slope ? slope + r * pitch + c : nullptr);
      }
    };
    times_packed<N, pitch>(rows, words_of<N>(d.width[l - 1]), d.width[l], s.h[l - 1], d.forward[l], d.bias[l],
                           [&](const Tile<N>& t, long r, long c) __attribute__((always_inline)) {
                             if (!d.skip[l]) return finish(t, r, c);
                             Tile<N> whole = t;
                             add_features<N>(maps, walk, r, count, d.skip[l] + c, whole);
                             finish(whole, r, c);
                           });
  }
}

// z[t, o] = W_L[o, :] h[t, :] + b_L[o]: a product in register blocks for many outputs, else a dot product along the row with a
// vector of partial sums.
template <class N, long pitch>
TCAM_INLINE void last_layer(const Decoder& d, long rows, Scratch<N, pitch>& s) {
  typedef typename N::WordVec W;
  const long outputs = d.width[d.layers];
  if (outputs >= wide_output) {
    times_packed<N, pitch>(rows, words_of<N>(d.width[d.layers - 1]), outputs, s.h[d.layers - 1], d.forward[d.layers],
                           d.bias[d.layers], [&](const Tile<N>& t, long r, long c) __attribute__((always_inline)) {
                             typename N::Real block[N::rows][columns_of<N>()];
                             for (int i = 0; i < N::rows; ++i)
                               for (int v = 0; v < register_vectors; ++v) store(block[i] + v * N::lanes, t.v[i][v]);
                             const long n = outputs - c < columns_of<N>() ? outputs - c : columns_of<N>();
                             for (long o = 0; o < n; ++o)
                               for (int i = 0; i < N::rows; ++i) s.z[(c + o) * max_tile + r + i] = block[i][o];
                           });
    return;
  }
  constexpr int group = N::rows % 6 ? 8 : 6;
  constexpr int word_lanes = TCAM_VECTOR_BYTES / sizeof(typename N::Word);
  const long words = round_up((d.width[d.layers - 1] + N::pack - 1) / N::pack, word_lanes);
  const typename N::Word* h = s.h[d.layers - 1];
  const typename N::Real* bias = static_cast<const typename N::Real*>(d.bias[d.layers]);
  for (long o = 0; o < outputs; ++o) {
    const typename N::Word* w = static_cast<const typename N::Word*>(d.last) + o * words;
    for (long t = 0; t < rows; t += group) {
      typename N::Vec sum[group] = {};
      for (long k = 0; k < words; k += word_lanes) {
        const W col = load<W>(w + k);
#pragma GCC unroll 8
        for (int i = 0; i < group; ++i) sum[i] = N::dot(sum[i], load<W>(h + (t + i) * pitch + k), col);
      }
#pragma GCC unroll 8
      for (int i = 0; i < group; ++i) {
        typename N::Real x[N::lanes];
        store(x, sum[i]);
        s.z[o * max_tile + t + i] = sum_lanes<typename N::Real, N::lanes>(x) + bias[o];
      }
    }
  }
}

// Adds the loss of a tile's voxels in channel `o` to `sum` and replaces z by the gradient of the loss with respect to z_L.
template <class N>
TCAM_INLINE void compare_tile(const Decoder& d, const Comparison& comparison, const Volume& target, const Walk& walk, int count,
                              long o, typename N::Real* z, double& sum) {
  typedef typename N::Real Real;
  typedef typename N::Vec Vec;
  typedef Maths<typename N::Arith> A;
  typedef LossMaths<typename N::Arith> L;
  Real want[max_tile], value[max_tile];
  for (int t = 0; t < count; ++t) want[t] = Elements<Real>::read(target.data, target.dtype, target.index(o, walk.out[t]));
  for (int t = count; t < count + N::lanes && t < max_tile; ++t) want[t] = 0;
  for (int t = 0; t < count; t += N::lanes) {
    const Vec x = load<Vec>(z + t), difference = A::output(d.output_activation, x) - load<Vec>(want + t);
    store(value + t, L::value(comparison.loss, difference, comparison.beta));
    store(z + t, L::slope(comparison.loss, difference, comparison.beta) * A::output_slope(d.output_activation, x));
  }
  for (int t = 0; t < count; ++t) sum += static_cast<double>(value[t]);
}

// The loss sums of a block by channel, so that their order does not depend on the tile.
struct LossSums {
  double channel[max_out] = {};
  __attribute__((always_inline)) void add_to(const Comparison* comparison) const {
    for (int o = 0; comparison && o < max_out; ++o) *comparison->sum += channel[o];
  }
};

template <class N, long pitch>
static void forward_block(const Decoder& d, const Maps& maps, const Block& block, const Volume& volume,
                          const Comparison* comparison, int tile, void* scratch) {
  typedef typename N::Real Real;
  typedef Maths<typename N::Arith> A;
  N::begin();
  Scratch<N, pitch> s(d, false, scratch);
  Walk walk(maps, block);
  LossSums losses;
  while (const int count = walk.next(tile)) {
    const long rows = round_up(count, N::rows);
    hidden_layers<N, pitch>(d, maps, walk, count, rows, s, false);
    if (d.layers > 1) last_layer<N, pitch>(d, rows, s);
    for (long o = 0; o < d.width[d.layers]; ++o) {
      Real* z = s.z + o * max_tile;
      if (comparison) {
        compare_tile<N>(d, *comparison, volume, walk, count, o, z, losses.channel[o]);
        continue;
      }
      for (int t = 0; t < count; t += N::lanes) store(z + t, A::output(d.output_activation, load<typename N::Vec>(z + t)));
      for (int t = 0; t < count; ++t) Elements<Real>::write(volume.data, volume.dtype, volume.index(o, walk.out[t]), z[t]);
    }
  }
  losses.add_to(comparison);
  N::end();
}

// ---- backward --------------------------------------------------------------------------

// Interleaves words of a tile by voxel: rows 2t and 2t + 1 of `rows` into row t of `pairs`.
template <class N, long pitch>
TCAM_INLINE void interleave_rows(long voxel_words, long n, const typename N::Word* rows, typename N::Word* pairs) {
  if constexpr (N::pack == 2)
    for (long t = 0; t < voxel_words; ++t)
      for (long c = 0; c < n; c += N::lanes)
        store(pairs + t * pitch + c, N::interleave(rows + 2 * t * pitch, rows + (2 * t + 1) * pitch, c));
}

template <class N>
TCAM_INLINE void add_row(typename N::Real* dst, const typename N::Real* src, long n) {
  for (long c = 0; c < n; c += N::lanes) store(dst + c, load<typename N::Vec>(dst + c) + load<typename N::Vec>(src + c));
}

// Adds the gradients of the factors of voxel t's features, of which x is the gradient, to rows of the maps' gradients.
template <class N>
TCAM_INLINE void add_products(const Maps& maps, const Walk& walk, long t, const typename N::Real* x, typename N::Real* da,
                              typename N::Real* db, typename N::Real* dg) {
  typedef typename N::Vec Vec;
  typedef typename N::Real Real;
  const Real *a = static_cast<const Real*>(maps.a) + walk.a[t], *b = static_cast<const Real*>(maps.b) + walk.b[t],
             *g = static_cast<const Real*>(maps.g) + walk.g[t];
  for (long c = 0; c < maps.stride; c += N::lanes) {
    const Vec xa = load<Vec>(x + c) * load<Vec>(a + c), bc = load<Vec>(b + c), gc = load<Vec>(g + c);
    store(da + c, load<Vec>(da + c) + load<Vec>(x + c) * (bc * gc));
    store(db + c, load<Vec>(db + c) + xa * gc);
    store(dg + c, load<Vec>(dg + c) + xa * bc);
  }
}

template <class N, long pitch>
static void backward_block(const Decoder& d, const Maps& maps, const Block& block, const Volume& volume,
                           const Comparison* comparison, const BlockGradients& grad, int tile, void* scratch) {
  typedef typename N::Real Real;
  typedef typename N::Word Word;
  typedef typename N::Vec Vec;
  typedef Maths<typename N::Arith> A;
  constexpr int nr = columns_of<N>();
  N::begin();
  Scratch<N, pitch> s(d, true, scratch);
  Real* sums = static_cast<Real*>(grad.decoder);
  const int last = d.layers;
  const long n_out = d.width[last];
  Walk walk(maps, block);
  LossSums losses;
  if (d.first_width != d.width[1]) memset(s.delta_1, 0, max_tile * pitch * static_cast<long>(sizeof(Real)));  // between parts
  while (const int count = walk.next(tile)) {
    const long rows = round_up(count, N::rows);
    const long voxel_words = words_of<N>(count);
    hidden_layers<N, pitch>(d, maps, walk, count, rows, s, true);
    if (last > 1 && (comparison || d.output_activation.kind != OutputActivation::none)) last_layer<N, pitch>(d, rows, s);

    // delta_L = grad_output * output'(z_L), in place of z.
    for (long o = 0; o < n_out; ++o) {
      Real* z = s.z + o * max_tile;
      if (comparison) {
        compare_tile<N>(d, *comparison, volume, walk, count, o, z, losses.channel[o]);
        continue;
      }
      for (int t = 0; t < count; t += N::lanes) store(z + t, A::output_slope(d.output_activation, load<Vec>(z + t)));
      for (int t = 0; t < count; ++t) z[t] *= Elements<Real>::read(volume.data, volume.dtype, volume.index(o, walk.out[t]));
    }

    if (last == 1) {
      for (long t = 0; t < count; ++t)
        for (long c = 0; c < maps.stride; ++c) s.delta_1[t * pitch + c] = c < n_out ? s.z[c * max_tile + t] : Real(0);
    } else {
      Word* delta = s.delta[last & 1];
      Real* bias = sums ? sums + d.grad_bias_offset[last] : nullptr;
      Real row[round_up(max_out, nr)] = {};
      for (long t = 0; t < rows; ++t) {  // delta as rows of words, zero from n_out and from count on
        for (long o = 0; o < n_out; ++o) row[o] = t < count ? s.z[o * max_tile + t] : Real(0);
        for (long c = 0; c < round_up(n_out, nr); c += N::lanes) N::put(delta + t * pitch, c, load<Vec>(row + c));
        if (bias) add_row<N>(bias, row, round_up(n_out, nr));
      }
      if (sums) {
        for (int l = 1; l < last; ++l) interleave_rows<N, pitch>(voxel_words, round_up(d.width[l], nr), s.h[l], s.pairs[l]);
      }
    }

    for (int l = last; l >= 2; --l) {
      const Word* delta = s.delta[l & 1];
      const long n = d.width[l], m = d.width[l - 1];
      if (sums) {
        Real* outer = sums + d.grad_offset[l];
        if constexpr (N::group > 1) {
          gather_columns<N, pitch>(voxel_words, round_up(n, nr), delta, s.delta_pairs, max_tile / 2);
          add_outer_tiles<N, pitch>(voxel_words, n, m, s.delta_pairs, max_tile / 2, s.pairs[l - 1], outer, round_up(m, nr));
        } else {
          if (N::pack == 2) interleave_rows<N, pitch>(voxel_words, round_up(n, nr), delta, s.delta_pairs);
          add_outer<N, pitch>(voxel_words, n, m, N::pack == 2 ? s.delta_pairs : delta, s.pairs[l - 1], outer, round_up(m, nr));
        }
      }
      Word* next = s.delta[(l - 1) & 1];
      const Word* h = s.h[l - 1];
      const Real* slope = s.slope[l - 1];
      Real* bias = sums && l > 2 ? sums + d.grad_bias_offset[l - 1] : nullptr;
      Real* first = l == 2 ? s.delta_1 : d.skip[l - 1] ? s.delta_1 + d.skip[l - 1] : nullptr;
      auto delta_of = [&](auto slope_at) __attribute__((always_inline)) {
        times_packed<N, pitch>(rows, words_of<N>(n), m, delta, d.transposed[l], nullptr,
                               [&](const Tile<N>& t, long r, long c) __attribute__((always_inline)) {
                                 Vec column[register_vectors] = {};
                                 if (bias)
                                   for (int v = 0; v < register_vectors; ++v) column[v] = load<Vec>(bias + c + v * N::lanes);
#pragma GCC unroll 16
                                 for (int i = 0; i < N::rows; ++i)
#pragma GCC unroll 4
                                   for (int v = 0; v < register_vectors; ++v) {
                                     const long row = (r + i) * pitch, at = c + v * N::lanes;
                                     const Vec x = t.v[i][v] * slope_at(row, at);
                                     column[v] += x;
                                     if (first) store(first + row + at, x);
                                     if (l > 2) N::put(next + row, at, x);
                                   }
                                 if (bias)
                                   for (int v = 0; v < register_vectors; ++v) store(bias + c + v * N::lanes, column[v]);
                               });
      };
      if (slope)
        delta_of([&](long row, long at) __attribute__((always_inline)) { return load<Vec>(slope + row + at); });
      else
        delta_of([&](long row, long at)
                     __attribute__((always_inline)) { return A::slope_of_value(d.activation[l - 1], N::get(h + row, at)); });
    }

    Real *da = static_cast<Real*>(grad.da), *db = static_cast<Real*>(grad.db), *dg = static_cast<Real*>(grad.dg);
    for (long t = 0; t < count; ++t) {
      const Real* x = s.delta_1 + t * pitch;
      if (maps.multiply) {
        if (da) add_products<N>(maps, walk, t, x, da + walk.a[t], db + walk.b[t], dg + walk.g[t]);
        continue;
      }
      if (da) add_row<N>(da + walk.a[t], x, maps.stride);
      if (db) add_row<N>(db + walk.b[t], x, maps.stride);
      if (dg) add_row<N>(dg + walk.g[t], x, maps.stride);
    }
  }
  losses.add_to(comparison);
  N::end();
}

// ---- the table -------------------------------------------------------------------------

template <class N>
static double spin(long iterations, void* sink) {
  if constexpr (N::group > 1) {
    N::begin();
    const typename N::Word zero[8 * N::group] = {};
    typename N::Tiles tiles;
    tiles.clear();
    for (long i = 0; i < iterations; ++i) tiles.multiply(zero, 0, zero, 0, 8 * N::group);
    float sums[32][32];
    tiles.store(sums[0], 32);
    N::end();
    memcpy(sink, sums, sizeof sums[0]);
    return 2.0 * static_cast<double>(iterations) * 32 * 32 * 8 * N::group * N::pack;
  }
  typedef typename N::WordVec W;
  Tile<N> sum;
#pragma GCC unroll 16
  for (int r = 0; r < register_rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < register_vectors; ++v) sum.v[r][v] = typename N::Vec{};
  const W a{}, b{};
  for (long i = 0; i < iterations; ++i) {
    __asm__ volatile("");  // keep the loop
#pragma GCC unroll 16
    for (int r = 0; r < register_rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < register_vectors; ++v) {
        sum.v[r][v] = N::dot(sum.v[r][v], a, b);
        __asm__ volatile("" : TCAM_VECTOR_REGISTER(sum.v[r][v]));  // keep every product
      }
  }
  typename N::Real* out = static_cast<typename N::Real*>(sink);
#pragma GCC unroll 16
  for (int r = 0; r < register_rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < register_vectors; ++v) store(out + (r * register_vectors + v) * N::lanes, sum.v[r][v]);
  return 2.0 * static_cast<double>(iterations) * register_rows * register_vectors * N::lanes * N::pack;
}

template <long words>
struct Pitch {
  static constexpr long value = words;
};

// Calls f with the row pitch, in words, of narrow or of wide decoders: 16 more than a width, to spread rows over cache sets.
template <class F>
static auto with_pitch(const Decoder& d, F f) {
  long widest = 0;
  for (int l = 1; l <= d.layers; ++l) widest = d.width[l] > widest ? d.width[l] : widest;
  widest = d.first_width > widest ? d.first_width : widest;
  if (widest <= 128) return f(Pitch<144>());
  return f(Pitch<TCAM_MAX_WIDTH + 16>());
}

template <class N>
static long scratch_bytes(const Decoder& d, bool backward) {
  const long texels = 2 * max_tile * texel_pitch * static_cast<long>(sizeof(typename N::Real));
  const long voxels = with_pitch(d, [&](auto pitch) { return Scratch<N, decltype(pitch)::value>(d, backward, nullptr).bytes; });
  return texels > voxels ? texels : voxels;
}
template <class N>
static void forward(const Decoder& d, const Maps& m, const Block& b, const Volume& v, const Comparison* comparison, int tile,
                    void* scratch) {
  with_pitch(d, [&](auto pitch) { forward_block<N, decltype(pitch)::value>(d, m, b, v, comparison, tile, scratch); });
}
template <class N>
static void backward(const Decoder& d, const Maps& m, const Block& b, const Volume& v, const Comparison* comparison,
                     const BlockGradients& g, int tile, void* scratch) {
  with_pitch(d, [&](auto pitch) { backward_block<N, decltype(pitch)::value>(d, m, b, v, comparison, g, tile, scratch); });
}

template <class N>
constexpr Engine core_engine() {
  Engine e = {};
  e.rows = N::rows;
  e.columns = columns_of<N>();
  e.pack = N::pack;
  e.group = N::group;
  e.word_bytes = sizeof(typename N::Word);
  e.real_bytes = sizeof(typename N::Real);
  e.pack_panels = pack_panels<N>;
  e.pack_rows = pack_rows<N>;
  e.scratch_bytes = scratch_bytes<N>;
  e.forward = forward<N>;
  e.backward = backward<N>;
  e.bilinear_row = bilinear_row<N>;
  e.add_scaled = add_scaled<N>;
  e.spin = spin<N>;
  return e;
}

template <class N>
constexpr Engine full_engine() {
  Engine e = core_engine<N>();
  e.project = project<N>;
  e.unproject = unproject<N>;
  e.gather = gather<N>;
  e.scatter = scatter<N>;
  e.dot = dot<N>;
  e.normals = normals;
  e.philox = philox;
  return e;
}

const Engine* engine(int kind) {
  static constexpr Engine f32 = full_engine<F32>();
  static constexpr Engine f64 = full_engine<F64>();
#if defined(TCAM_HAS_TILES)
  static constexpr Engine bf16 = core_engine<AMX>();
  if (kind == 2) return &bf16;
#elif defined(TCAM_HAS_BF16)
  static constexpr Engine bf16 = core_engine<BF16>();
  if (kind == 2) return &bf16;
#endif
  return kind == 0 ? &f32 : kind == 1 ? &f64 : nullptr;
}

}  // namespace TCAM_ISA
}  // namespace tcam
