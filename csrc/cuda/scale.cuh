// Scales that keep an array inside the range of a narrow format: powers of two, computed on the device from the array's largest
// magnitude.
#pragma once
#include "../maths/half.h"
#include "sums.cuh"

namespace tcam {

constexpr int scale_blocks = 1024;
// float16's scale brings the largest dl/dy to 2^scale_exponent, which leaves 6 doublings up to overflow and 24 halvings down to
// underflow. scale_exponent_open applies where dl/dy has no bound: the mse of an unbounded output.
constexpr int scale_exponent = 10;
constexpr int scale_exponent_open = 4;

// largest[block] = the largest magnitude among the block's elements of values (count elements of `dtype`); NaN and infinity
// count as infinity. largest: (gridDim.x). Shared memory: reduce_bytes.
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

// scale[0] = the power of two that brings m = factor * (offset + the largest of largest[0, blocks)) into
// [2^(exponent-1), 2^exponent), and scale[1] = 1 / scale[0]. Both are 1 where m is 0. Where m is not finite, scale[0] is 1 and
// scale[1] is `without`. One thread.
static __global__ void scale_kernel(const float* largest, int blocks, float offset, float factor, int exponent, float without,
                                    float* scale) {
  float most = 0.f;
  for (int b = 0; b < blocks; ++b) most = fmaxf(most, largest[b]);
  most = factor * (offset + most);
  int from = exponent;
  if (most > 0.f && most <= 3.4028234663852886e38f) frexpf(most, &from);
  const int by = from - exponent < -126 ? -126 : from - exponent > 126 ? 126 : from - exponent;
  scale[0] = ldexpf(1.f, -by);
  scale[1] = most <= 3.4028234663852886e38f ? ldexpf(1.f, by) : without;
}
// *both = a[1] * b[1], the inverse of two scales applied one after the other. One thread.
static __global__ void both_scales_kernel(const float* a, const float* b, float* both) { *both = a[1] * b[1]; }

}  // namespace tcam
