// A tiled matrix product C = A B, used for every product outside the fused kernels. Functors read A and B and store C, so that
// activations, transposes and partial sums need no pass of their own.
#pragma once
#include "ptx.cuh"

namespace tcam {

constexpr int gemm_threads = 256;

// A tile of C, rows x columns, as gemm_kernel's block accumulates it: fused multiply-adds in Real. add() adds the product of
// a_tile (depth, a_pitch) and b_tile (depth, b_pitch), both in shared memory; each(f) calls f(row, column, sum) for the
// thread's elements. A thread owns (rows/16) x 4 elements, 16 apart, so that a warp's reads of shared memory are broadcasts or
// neighbours.
template <class Real_, int rows_>
struct Scalars {
  static constexpr int rows = rows_, columns = 64, depth = 16, a_pitch = rows + 4, b_pitch = columns + 4;
  static constexpr int own_rows = rows / 16, own_columns = columns / 16;
  using Real = Real_;
  using Number = Real;  // type of a_tile's and b_tile's elements
  Real sum[own_rows][own_columns] = {};

  TCAM_DEVICE static Real number(Real x) { return x; }

  TCAM_DEVICE void add(const Real* a_tile, const Real* b_tile) {
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
    for (int q = 0; q < depth; ++q) {
      Real x[own_rows], y[own_columns];
#pragma unroll
      for (int r = 0; r < own_rows; ++r) x[r] = a_tile[q * a_pitch + ty + 16 * r];
#pragma unroll
      for (int c = 0; c < own_columns; ++c) y[c] = b_tile[q * b_pitch + tx + 16 * c];
#pragma unroll
      for (int r = 0; r < own_rows; ++r)
#pragma unroll
        for (int c = 0; c < own_columns; ++c) sum[r][c] += x[r] * y[c];
    }
  }

  template <class F>
  TCAM_DEVICE void each(F f) const {
    for (int r = 0; r < own_rows; ++r)
      for (int c = 0; c < own_columns; ++c) f(threadIdx.x / 16 + 16 * r, threadIdx.x % 16 + 16 * c, sum[r][c]);
  }
};

// The same tile on tensor cores: float32 numbers rounded to TensorFloat-32 (10 bits of mantissa), summed in float32. A warp
// owns 32 x 32 elements. The pitches keep the reads of a fragment free of bank conflicts.
struct TensorFloats {
  static constexpr int rows = 128, columns = 64, depth = 16, a_pitch = rows + 8, b_pitch = columns + 8;
  using Real = float;
  using Number = uint32_t;
  float sum[2][4][4] = {};

  TCAM_DEVICE static uint32_t number(float x) { return ptx::to_tensor_float(x); }

  TCAM_DEVICE void add(const uint32_t* a_tile, const uint32_t* b_tile) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint32_t* a_at = a_tile + t * a_pitch + warp % 4 * 32 + g;
    const uint32_t* b_at = b_tile + t * b_pitch + warp / 4 * 32 + g;
#pragma unroll
    for (int q = 0; q < depth; q += 8) {
      uint32_t a[2][4], b[4][2];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r) a[m][r] = a_at[(q + (r >> 1) * 4) * a_pitch + m * 16 + (r & 1) * 8];
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) b[n][r] = b_at[(q + r * 4) * b_pitch + n * 8];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) ptx::mma_tensor_float(sum[m][n], a[m], b[n]);
    }
  }

  template <class F>
  TCAM_DEVICE void each(F f) const {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          f(warp % 4 * 32 + m * 16 + (r >> 1) * 8 + g, warp / 4 * 32 + n * 8 + t * 2 + (r & 1), sum[m][n][r]);
  }
};

// C (m, n) = A (m, k) B (k, n). Grid: (row tiles, column tiles, splits); a block owns a tile of C and the range
// [split * k_chunk, (split + 1) * k_chunk) of k, which it adds in ascending steps of `depth`.
//   A and B are functors. columns_adjacent: whether neighbours in memory differ in the column. load(row, column) reads memory;
//   value(loaded) turns that into the element. They are separate because the loads of the next step are issued before the
//   products of this one, and their values are needed only after.
//   store(split, row, column, sum) is called once for each element of C and split.
template <class Tile, class A, class B, class Store>
__global__ void __launch_bounds__(gemm_threads)
    gemm_kernel(int64_t m, int n, int64_t k, int64_t k_chunk, A a, B b, Store store) {
  using Number = typename Tile::Number;
  constexpr int rows = Tile::rows, columns = Tile::columns, depth = Tile::depth;
  constexpr int own_a = rows * depth / gemm_threads, own_b = columns * depth / gemm_threads;
  Shared shared;
  Number* a_tile = shared.take<Number>(depth * Tile::a_pitch);  // [k][row]
  Number* b_tile = shared.take<Number>(depth * Tile::b_pitch);  // [k][column]
  const int thread = threadIdx.x;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * rows;
  const int column0 = blockIdx.y * columns;
  const int64_t begin = blockIdx.z * k_chunk, end = begin + k_chunk < k ? begin + k_chunk : k;

  auto a_element = [&](int u, int& r, int& q) {
    const int e = thread + u * gemm_threads;
    r = A::columns_adjacent ? e / depth : e % rows;
    q = A::columns_adjacent ? e % depth : e / rows;
  };
  auto b_element = [&](int u, int& q, int& c) {
    const int e = thread + u * gemm_threads;
    c = B::columns_adjacent ? e % columns : e / depth;
    q = B::columns_adjacent ? e / columns : e % depth;
  };
  typename Tile::Real a_next[own_a], b_next[own_b];
  auto clamped = [](int64_t x, int64_t count) { return x < count ? x : count - 1; };  // beyond the end: read, never used
  auto fetch = [&](int64_t k0) {
    int r, q, c;
#pragma unroll
    for (int u = 0; u < own_a; ++u) {
      a_element(u, r, q);
      a_next[u] = a.load(clamped(row0 + r, m), clamped(k0 + q, end));
    }
#pragma unroll
    for (int u = 0; u < own_b; ++u) {
      b_element(u, q, c);
      b_next[u] = b.load(clamped(k0 + q, end), clamped(column0 + c, n));
    }
  };

  Tile tile;
  if (begin < end) fetch(begin);
  for (int64_t k0 = begin; k0 < end; k0 += depth) {
    int r, q, c;
#pragma unroll
    for (int u = 0; u < own_a; ++u) {
      a_element(u, r, q);
      a_tile[q * Tile::a_pitch + r] = Tile::number(row0 + r < m && k0 + q < end ? a.value(a_next[u]) : 0);
    }
#pragma unroll
    for (int u = 0; u < own_b; ++u) {
      b_element(u, q, c);
      b_tile[q * Tile::b_pitch + c] = Tile::number(column0 + c < n && k0 + q < end ? b.value(b_next[u]) : 0);
    }
    __syncthreads();
    if (k0 + depth < end) fetch(k0 + depth);
    tile.add(a_tile, b_tile);
    __syncthreads();
  }
  tile.each([&](int r, int c, auto sum) {
    if (row0 + r < m && column0 + c < n) store(blockIdx.z, row0 + r, column0 + c, sum);
  });
}

// Launches gemm_kernel. k_chunk 0: a single split over all of k.
template <class Tile, class A, class B, class Store>
cudaError_t gemm(int64_t m, int n, int64_t k, int64_t k_chunk, A a, B b, Store store, cudaStream_t stream) {
  if (k_chunk <= 0 || k_chunk > k) k_chunk = k;
  const dim3 grid(static_cast<unsigned>((m + Tile::rows - 1) / Tile::rows),
                  static_cast<unsigned>((n + Tile::columns - 1) / Tile::columns),
                  static_cast<unsigned>((k + k_chunk - 1) / k_chunk));
  constexpr size_t bytes = Tile::depth * (Tile::a_pitch + Tile::b_pitch) * sizeof(typename Tile::Number) + 32;
  return launch(gemm_kernel<Tile, A, B, Store>, grid, gemm_threads, bytes, stream, m, n, k, k_chunk, a, b, store);
}

// ---- operands and results ---------------------------------------------------------------------

// Operands: a row-major matrix with `pitch` numbers from row to row (Rows), and the transpose of such a matrix (Transposed).
template <class Real>
struct Rows {
  static constexpr bool columns_adjacent = true;
  const Real* data;
  int64_t pitch;
  TCAM_DEVICE Real load(int64_t r, int64_t c) const { return data[r * pitch + c]; }
  TCAM_DEVICE Real value(Real x) const { return x; }
};
template <class Real>
struct Transposed {
  static constexpr bool columns_adjacent = false;
  const Real* data;
  int64_t pitch;
  TCAM_DEVICE Real load(int64_t r, int64_t c) const { return data[c * pitch + r]; }
  TCAM_DEVICE Real value(Real x) const { return x; }
};
// Stores: out[r, c] = sum + bias[c].
template <class Real>
struct WriteRows {
  Real* out;
  int64_t pitch;
  const Real* bias;  // null: none
  TCAM_DEVICE void operator()(int, int64_t r, int c, Real sum) const { out[r * pitch + c] = bias ? sum + bias[c] : sum; }
};
// out[r, c] += sum.
template <class Real>
struct AddRows {
  Real* out;
  int64_t pitch;
  TCAM_DEVICE void operator()(int, int64_t r, int c, Real sum) const { out[r * pitch + c] += sum; }
};
// out[c, r] = sum.
template <class Real>
struct WriteTransposed {
  Real* out;
  int64_t pitch;
  TCAM_DEVICE void operator()(int, int64_t r, int c, Real sum) const { out[c * pitch + r] = sum; }
};
// partials[split, r, c] += sum: the one store that takes more than one split.
template <class Real>
struct AddPartial {
  Real* partials;  // (splits, rows, columns)
  int64_t rows, columns;
  TCAM_DEVICE void operator()(int split, int64_t r, int c, Real sum) const {
    partials[(split * rows + r) * columns + c] += sum;
  }
};

}  // namespace tcam
