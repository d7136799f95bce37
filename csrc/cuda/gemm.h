// One tiled product for all that is a matrix product outside the fused kernels: C = A B, with A and B read and C written
// through functors, so that activations, layouts and gradients fuse into its loads and stores.
#pragma once
#include "device.h"

namespace tcam {

constexpr int gemm_threads = 256, gemm_columns = 64, gemm_depth = 16;

// A and B are functors (row, column) -> Real with `static constexpr bool columns_adjacent`: whether neighbours in memory differ
// in the column. store(split, row, column, sum) gets the sum over k in [split * k_chunk, ...), in ascending order.
// Grid: (row tiles, column tiles, splits). A thread owns (rows/16) x 4 elements 16 apart, so that its reads of the tiles in
// shared memory are broadcasts or neighbours.
template <class Real, int rows, class A, class B, class Store>
__global__ void __launch_bounds__(gemm_threads)
    gemm_kernel(int64_t m, int n, int64_t k, int64_t k_chunk, A a, B b, Store store) {
  constexpr int own_rows = rows / 16, own_columns = gemm_columns / 16;
  constexpr int a_pitch = rows + 4, b_pitch = gemm_columns + 4;
  Shared shared;
  Real* a_tile = shared.take<Real>(gemm_depth * a_pitch);  // [k][row]
  Real* b_tile = shared.take<Real>(gemm_depth * b_pitch);  // [k][column]
  const int thread = threadIdx.x, ty = thread / 16, tx = thread % 16;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * rows;
  const int column0 = blockIdx.y * gemm_columns;
  const int64_t begin = blockIdx.z * k_chunk, end = begin + k_chunk < k ? begin + k_chunk : k;

  Real sum[own_rows][own_columns] = {};
  for (int64_t k0 = begin; k0 < end; k0 += gemm_depth) {
    for (int e = thread; e < rows * gemm_depth; e += gemm_threads) {
      const int r = A::columns_adjacent ? e / gemm_depth : e % rows, q = A::columns_adjacent ? e % gemm_depth : e / rows;
      a_tile[q * a_pitch + r] = row0 + r < m && k0 + q < end ? a(row0 + r, k0 + q) : Real(0);
    }
    for (int e = thread; e < gemm_columns * gemm_depth; e += gemm_threads) {
      const int c = B::columns_adjacent ? e % gemm_columns : e / gemm_depth,
                q = B::columns_adjacent ? e / gemm_columns : e % gemm_depth;
      b_tile[q * b_pitch + c] = column0 + c < n && k0 + q < end ? b(k0 + q, column0 + c) : Real(0);
    }
    __syncthreads();
#pragma unroll
    for (int q = 0; q < gemm_depth; ++q) {
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
    __syncthreads();
  }
  for (int r = 0; r < own_rows; ++r)
    for (int c = 0; c < own_columns; ++c) {
      const int64_t row = row0 + ty + 16 * r;
      const int column = column0 + tx + 16 * c;
      if (row < m && column < n) store(blockIdx.z, row, column, sum[r][c]);
    }
}

// k_chunk 0: one sum over all of k.
template <class Real, int rows, class A, class B, class Store>
cudaError_t gemm(int64_t m, int n, int64_t k, int64_t k_chunk, A a, B b, Store store, cudaStream_t stream) {
  if (k_chunk <= 0 || k_chunk > k) k_chunk = k;
  const dim3 grid(static_cast<unsigned>((m + rows - 1) / rows), static_cast<unsigned>((n + gemm_columns - 1) / gemm_columns),
                  static_cast<unsigned>((k + k_chunk - 1) / k_chunk));
  constexpr size_t bytes = gemm_depth * (rows + 4 + gemm_columns + 4) * sizeof(Real) + 32;
  return launch(gemm_kernel<Real, rows, A, B, Store>, grid, gemm_threads, bytes, stream, m, n, k, k_chunk, a, b, store);
}

}  // namespace tcam
