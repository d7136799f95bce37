// Powers of two that bring an array's largest number where a narrow format has room for it, found on the device.
#pragma once
#include "../maths/half.h"
#include "sums.cuh"

namespace tcam {

constexpr int scale_blocks = 1024;
// Exponents of the scales of float16.
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
// inverse. 1 where there is none; the inverse is `without` where the largest is not finite.
static __global__ void scale_kernel(const float* largest, int blocks, float offset, float factor, int exponent, float without,
                                    float* scale) {
  float most = 0.f;
  for (int b = 0; b < blocks; ++b) most = fmaxf(most, largest[b]);
  most = factor * (offset + most);
  int own = exponent;
  if (most > 0.f && most <= 3.4028234663852886e38f) frexpf(most, &own);
  const int by = own - exponent < -126 ? -126 : own - exponent > 126 ? 126 : own - exponent;
  scale[0] = ldexpf(1.f, -by);
  scale[1] = most <= 3.4028234663852886e38f ? ldexpf(1.f, by) : without;
}
// both[1] = a[1] b[1]
static __global__ void both_scales_kernel(const float* a, const float* b, float* both) { *both = a[1] * b[1]; }

}  // namespace tcam
