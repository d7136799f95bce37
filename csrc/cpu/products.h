// Products of a tile and a packed matrix in register blocks, and the packing. Included only by voxel_core.cpp and texels.h,
// under the rules of simd.h.
#pragma once
#include "../maths/half.h"
#include "amx.h"
#include "voxel_core.h"

namespace tcam {
namespace TCAM_ISA {

constexpr int register_vectors = 2;

// ---- products --------------------------------------------------------------------------

template <class N>
struct Tile {
  typename N::Vec v[N::rows][register_vectors];
};

template <class N>
constexpr int columns_of() {
  return register_vectors * N::lanes;
}

// The words of a product's contraction over n reals.
template <class N>
TCAM_INLINE long words_of(long n) {
  return round_up((n + N::pack - 1) / N::pack, N::group);
}

// sum[r][:] += a[r, k] * b[k, :] over `words` words of the contraction.
template <class N, long row_pitch, long word_pitch>
TCAM_INLINE void multiply(Tile<N>& sum, const typename N::Word* a, const typename N::Word* b, long b_pitch, long words) {
  typedef typename N::WordVec W;
#pragma GCC unroll 4  // fewer instructions per product, which matters where threads share a core's front end
  for (long k = 0; k < words; ++k) {
    W col[register_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < register_vectors; ++v) col[v] = load<W>(b + v * N::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < register_rows; ++r) {
      const W x = N::broadcast(a + r * row_pitch);
#pragma GCC unroll 4
      for (int v = 0; v < register_vectors; ++v) sum.v[r][v] = N::dot(sum.v[r][v], x, col[v]);
    }
    a += word_pitch;
    b += b_pitch;
  }
}

// bias + a * packed, in register blocks of rows x n. `a` has rows of `pitch` words; a null bias is zero. Each block goes to
// epilogue(tile, row, column).
template <class N, long pitch, class Epilogue>
TCAM_INLINE void times_packed(long rows, long words, long n, const typename N::Word* a, const void* packed, const void* bias,
                              Epilogue epilogue) {
  constexpr int nr = columns_of<N>();
  const typename N::Word* panel = static_cast<const typename N::Word*>(packed);
  for (long c = 0; c < n; c += nr, panel += words * nr)
    for (long r = 0; r < rows; r += N::rows) {
      Tile<N> sum;
      if constexpr (N::group > 1) {
        typename N::Tiles tiles;
        if (bias)
          tiles.load(static_cast<const float*>(bias) + c, 0);
        else
          tiles.clear();
        tiles.multiply(a + r * pitch, pitch, panel, nr, words);
        tiles.store(reinterpret_cast<float*>(&sum), nr);
        epilogue(sum, r, c);
        continue;
      }
      typename N::Vec start[register_vectors];
      for (int v = 0; v < register_vectors; ++v)
        start[v] =
            bias ? load<typename N::Vec>(static_cast<const typename N::Real*>(bias) + c + v * N::lanes) : typename N::Vec{};
#pragma GCC unroll 16
      for (int i = 0; i < N::rows; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < register_vectors; ++v) sum.v[i][v] = start[v];
      multiply<N, pitch, 1>(sum, a + r * pitch, panel, nr, words);
      epilogue(sum, r, c);
    }
}

// grad (n rows, grad_pitch) += delta^T h, both (words, pitch): the weight gradient of a tile.
template <class N, long pitch>
TCAM_INLINE void add_outer(long words, long n, long m, const typename N::Word* delta, const typename N::Word* h,
                           typename N::Real* grad, long grad_pitch) {
  constexpr int nr = columns_of<N>();
  for (long c = 0; c < m; c += nr)
    for (long r = 0; r < n; r += register_rows) {
      typename N::Real* g = grad + r * grad_pitch + c;
      Tile<N> sum;
#pragma GCC unroll 16
      for (int i = 0; i < register_rows; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < register_vectors; ++v) sum.v[i][v] = load<typename N::Vec>(g + i * grad_pitch + v * N::lanes);
      multiply<N, 1, pitch>(sum, delta + r, h + c, pitch, words);
#pragma GCC unroll 16
      for (int i = 0; i < register_rows; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < register_vectors; ++v) store(g + i * grad_pitch + v * N::lanes, sum.v[i][v]);
    }
}

// The same in tiles. `delta` has a row of words for each channel (gather_columns), delta_pitch words apart.
template <class N, long pitch>
TCAM_INLINE void add_outer_tiles(long words, long n, long m, const typename N::Word* delta, long delta_pitch,
                                 const typename N::Word* h, typename N::Real* grad, long grad_pitch) {
  for (long c = 0; c < m; c += columns_of<N>())
    for (long r = 0; r < n; r += N::rows) {
      typename N::Tiles tiles;
      tiles.load(grad + r * grad_pitch + c, grad_pitch);
      tiles.multiply(delta + r * delta_pitch, delta_pitch, h + c, pitch, words);
      tiles.store(grad + r * grad_pitch + c, grad_pitch);
    }
}

// Channels of a tile as rows of words, each of two voxels: columns[c, t] from rows 2t and 2t + 1 of `rows`.
template <class N, long pitch>
TCAM_INLINE void gather_columns(long words, long n, const typename N::Word* rows, typename N::Word* columns,
                                long columns_pitch) {
  for (long c = 0; c < n; c += N::lanes)
    for (long t = 0; t < words; t += N::lanes) {
      typename N::WordVec in[N::lanes];
#pragma GCC unroll 16
      for (int i = 0; i < N::lanes; ++i) in[i] = N::interleave(rows + 2 * (t + i) * pitch, rows + (2 * (t + i) + 1) * pitch, c);
      N::transpose(in, columns + c * columns_pitch + t, columns_pitch);
    }
}

// The sum of a vector's lanes: the halves are added until one lane is left.
template <class Real, int lanes>
TCAM_INLINE Real sum_lanes(const Real* x) {
  if constexpr (lanes == 1) {
    return x[0];
  } else {
    Real half[lanes / 2];
    for (int i = 0; i < lanes / 2; ++i) half[i] = x[i] + x[i + lanes / 2];
    return sum_lanes<Real, lanes / 2>(half);
  }
}

// ---- packing ---------------------------------------------------------------------------

template <class N>
static void pack_panels(const void* source, long k_stride, long n_stride, long k, long n, void* dst) {
  typedef typename N::Real Real;
  constexpr int nr = columns_of<N>();
  const Real* src = static_cast<const Real*>(source);
  typename N::Word* out = static_cast<typename N::Word*>(dst);
  for (long c = 0; c < n; c += nr)
    for (long kk = 0; kk < words_of<N>(k) * N::pack; kk += N::pack)
      for (int x = 0; x < nr; ++x) {
        Real pair[2] = {0, 0};
        for (int p = 0; p < N::pack; ++p)
          if (kk + p < k && c + x < n) pair[p] = src[(kk + p) * k_stride + (c + x) * n_stride];
        *out++ = N::make(pair, N::pack);
      }
}

template <class N>
static void pack_rows(const void* source, long rows, long n, void* dst, long dst_stride) {
  const typename N::Real* src = static_cast<const typename N::Real*>(source);
  typename N::Word* out = static_cast<typename N::Word*>(dst);
  for (long r = 0; r < rows; ++r)
    for (long w = 0; w < dst_stride; ++w) {
      typename N::Real pair[2] = {0, 0};
      for (int p = 0; p < N::pack; ++p)
        if (w * N::pack + p < n) pair[p] = src[r * n + w * N::pack + p];
      out[r * dst_stride + w] = N::make(pair, N::pack);
    }
}

}  // namespace TCAM_ISA
}  // namespace tcam
