// What goes into the fused kernels: maps of the first layer, weights padded and rounded, and the scales that keep float16 from
// underflow.
#pragma once
#include "../maths/half.h"
#include "planes.h"
#include "ptx.h"

namespace tcam {

// ---- operands -------------------------------------------------------------------------------

// map (nx, ny, padded) = the sum of the planes at every (x0 + x, y), with bias, rounded; zero in the padding. A warp takes an
// (x, y).
template <class T>
__global__ void __launch_bounds__(threads) map_kernel(PlaneList<float> planes, int n, int padded, int64_t x0, int64_t nx,
                                                      int64_t ny, const float* bias, uint16_t* map) {
  const int lane = threadIdx.x % 32;
  for (int64_t v = blockIdx.x * static_cast<int64_t>(warps) + threadIdx.x / 32; v < nx * ny;
       v += static_cast<int64_t>(gridDim.x) * warps) {
    for (int c = lane; c < padded; c += 32) {
      float sum = bias && c < n ? bias[c] : 0.f;
      for (int q = 0; q < planes.count && c < n; ++q)
        sum += bilinear(planes.plane[q], planes.columns[q], n, c, planes.rows_at[q][x0 + v / ny], planes.columns_at[q][v % ny]);
      map[v * padded + c] = T::round(sum);
    }
  }
}

// weight (rows, columns), its rows times row_factors and *scale (null: 1), and bias (rows) to (padded_rows, padded) and
// (padded_rows), zero beyond.
template <class Out, class Round>
TCAM_DEVICE void pad_matrix(const float* weight, const float* row_factors, const float* scale, const float* bias, int rows,
                            int columns, int padded_rows, int padded, Out* to_weight, float* to_bias, Round round) {
  for (int e = blockIdx.x * threads + threadIdx.x; e < padded_rows * padded; e += gridDim.x * threads) {
    const int r = e / padded, c = e % padded;
    const float w = r < rows && c < columns ? weight[static_cast<int64_t>(r) * columns + c] : 0.f;
    to_weight[e] = round(row_factors && r < rows ? w * (row_factors[r] * (scale ? *scale : 1.f)) : w);
    if (c == 0 && to_bias) to_bias[r] = bias && r < rows ? bias[r] : 0.f;
  }
}
template <class T>
__global__ void __launch_bounds__(threads)
    pad_hidden_kernel(const float* weight, const float* row_factors, const float* scale, const float* bias, int rows,
                      int columns, int padded, uint16_t* to_weight, float* to_bias) {
  pad_matrix(weight, row_factors, scale, bias, rows, columns, padded, padded, to_weight, to_bias,
             [](float x) { return T::round(x); });
}
static __global__ void __launch_bounds__(threads) pad_last_kernel(const float* weight, const float* bias, int rows, int columns,
                                                                  int padded, float* to_weight, float* to_bias) {
  pad_matrix(weight, nullptr, nullptr, bias, rows, columns, rows, padded, to_weight, to_bias, [](float x) { return x; });
}

// ---- scales for float16 -------------------------------------------------------------------------

constexpr int scale_blocks = 1024;
constexpr int scale_exponent = 10;      // of the largest dl/dy: room for 6 doublings above, for 24 halvings below
constexpr int scale_exponent_open = 4;  // where dl/dy has no bound: mse of an output without one

// The largest magnitude of each block's numbers; one that is not finite counts as infinity.
static __global__ void __launch_bounds__(threads) largest_kernel(const void* values, int dtype, int64_t count, float* largest) {
  Shared shared;
  float* all = shared.take<float>(threads);
  float most = 0.f;
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    const float x = fabsf(Elements<float>::read(values, dtype, e));
    most = x <= 3.4028234663852886e38f ? fmaxf(most, x) : INFINITY;
  }
  most = reduce_block(most, all, [](float a, float b) { return fmaxf(a, b); });
  if (threadIdx.x == 0) largest[blockIdx.x] = most;
}

// scale[0]: the power of two that brings factor * (offset + the largest magnitude) to 2^exponent or next below; scale[1]: its
// inverse. 1 where there is none.
static __global__ void scale_kernel(const float* largest, int blocks, float offset, float factor, int exponent, float* scale) {
  float most = 0.f;
  for (int b = 0; b < blocks; ++b) most = fmaxf(most, largest[b]);
  most = factor * (offset + most);
  int own = exponent;
  if (most > 0.f && most <= 3.4028234663852886e38f) frexpf(most, &own);
  const int by = own - exponent < -100 ? -100 : own - exponent > 100 ? 100 : own - exponent;
  scale[0] = ldexpf(1.f, -by);
  scale[1] = ldexpf(1.f, by);
}
// both[1] = a[1] b[1]
static __global__ void both_scales_kernel(const float* a, const float* b, float* both) { *both = a[1] * b[1]; }

}  // namespace tcam
