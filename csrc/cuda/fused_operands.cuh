// What goes into the fused kernels: maps of the first layer, weights padded and rounded, and the scales that keep float16 from
// underflow.
#pragma once
#include "../maths/half.h"
#include "planes.cuh"
#include "ptx.cuh"
#include "scale.cuh"

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

constexpr int scale_exponent = 10;      // of the largest dl/dy: room for 6 doublings above, for 24 halvings below
constexpr int scale_exponent_open = 4;  // where dl/dy has no bound: mse of an output without one

}  // namespace tcam
