// Sums in a fixed order: along an axis, down the rows of a matrix, over partial sums, over a block. Each output element is
// summed by one thread in ascending order, or by a fixed tree; none uses atomics.
#pragma once
#include "vector.cuh"

namespace tcam {

constexpr int threads = 256, warps = threads / 32;

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// map[x, y, :] += sum over s < ns of delta[x*x_step + y*y_step + s*s_step, :].
//   delta: rows of n channels, the steps count rows; map: rows of n channels, map_pitch rows from x to x + 1.
// A thread owns some groups of `group` channels of a pair (x, y), and every slices-th s in ascending order, from its slice on;
// the first slice's thread then adds the others'. A block has `threads` threads: lanes * slices for each of its pairs; both are
// powers of two.
template <class Real, int group>
__global__ void __launch_bounds__(threads)
    add_axis_sum_kernel(const Real* delta, int n, int nx, int ny, int ns, int64_t x_step, int64_t y_step, int64_t s_step,
                        Real* map, int64_t map_pitch, int lanes, int slices) {
  constexpr int at_once = 8;
  Shared shared;
  Real* const others = shared.take<Real>(threads * group);
  const int lane = threadIdx.x % lanes, slice = threadIdx.x / lanes % slices, pairs = threads / (lanes * slices);
  Real* const mine = others + threadIdx.x * group;
  for (int first = blockIdx.x * pairs; first < nx * ny; first += gridDim.x * pairs) {
    const int b = first + threadIdx.x / (lanes * slices), x = b / ny, y = b % ny;
    for (int c0 = 0; c0 < n; c0 += lanes * group) {
      const int c = c0 + lane * group;
      const bool exists = b < nx * ny && c < n;
      Real sum[group] = {};
      const Real* const from = delta + (x * x_step + y * y_step) * n + c;
      for (int s = slice; exists && s < ns; s += at_once * slices) {
        Real v[at_once][group];  // loaded without a branch between, beyond the end a second time
#pragma unroll
        for (int t = 0; t < at_once; ++t) load_vector(v[t], from + (s + t * slices < ns ? s + t * slices : s) * s_step * n);
#pragma unroll
        for (int t = 0; t < at_once; ++t)
#pragma unroll
          for (int i = 0; i < group; ++i) sum[i] += s + t * slices < ns ? v[t][i] : Real(0);
      }
      if (slices > 1) {
        store_vector(mine, sum);
        __syncthreads();
        for (int t = 1; t < slices && slice == 0; ++t)
#pragma unroll
          for (int i = 0; i < group; ++i) sum[i] += mine[t * lanes * group + i];
        __syncthreads();
      }
      if (!exists || slice) continue;
      Real* const to = map + (x * map_pitch + y) * n + c;
      Real before[group];
      load_vector(before, to);
#pragma unroll
      for (int i = 0; i < group; ++i) before[i] += sum[i];
      store_vector(to, before);
    }
  }
}

// partials[s, :] += sum of rows [s * chunk, (s + 1) * chunk), ascending. rows: (count, n); partials: (splits, n).
// Block s owns split s, a thread some of its columns.
template <class Real>
__global__ void add_column_sums_kernel(const Real* rows, int64_t count, int n, int64_t chunk, Real* partials) {
  const int64_t begin = blockIdx.x * chunk, end = begin + chunk < count ? begin + chunk : count;
  for (int c = threadIdx.x; c < n; c += blockDim.x) {
    Real sum = 0;
    for (int64_t r = begin; r < end; ++r) sum += rows[r * n + c];
    partials[blockIdx.x * static_cast<int64_t>(n) + c] += sum;
  }
}

// Partial sums of a matrix: split s is a matrix at data + s * split_pitch, with row_pitch numbers from row to row.
template <class Real>
struct Partials {
  const Real* data;
  int64_t splits, split_pitch, row_pitch;
};

// out[r*pitch + c] = *factor * sum over splits of element (r, c), splits ascending; a null factor is 1. A thread owns an
// element.
template <class Real>
__global__ void combine_kernel(Partials<Real> in, int64_t rows, int columns, const Real* factor, Real* out, int64_t pitch) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < rows * columns;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t r = e / columns, c = e % columns;
    Real sum = 0;
    for (int64_t s = 0; s < in.splits; ++s) sum += in.data[s * in.split_pitch + r * in.row_pitch + c];
    out[r * pitch + c] = factor ? sum * *factor : sum;
  }
}

// The join of the `value` of all `threads` threads of a block, by a binary tree, so always in the same order. Every thread gets
// it. `all`: shared memory for `threads` numbers. All threads of the block must call it.
template <class Number, class Join>
TCAM_DEVICE Number reduce_block(Number value, Number* all, Join join) {
  all[threadIdx.x] = value;
  __syncthreads();
  for (int half = threads / 2; half; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) all[threadIdx.x] = join(all[threadIdx.x], all[threadIdx.x + half]);
    __syncthreads();
  }
  return all[0];
}
constexpr size_t reduce_bytes = threads * sizeof(double);  // enough shared memory for reduce_block of float or double

// *total += sum of values (count): thread t adds elements t, t + threads, ..., then the tree joins the threads. One block.
static __global__ void __launch_bounds__(threads) add_total_kernel(const double* values, int count, double* total) {
  Shared shared;
  double* all = shared.take<double>(threads);
  double sum = 0;
  for (int v = threadIdx.x; v < count; v += threads) sum += values[v];
  sum = reduce_block(sum, all, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0) *total += sum;
}

}  // namespace tcam
