// What a card's tensor cores reach through mma.sync, with and without the matrix loads that the fused kernels make: the ceiling
// that docs/performance.md holds them to. Prints JSON.
//
//     nvcc -std=c++17 -O3 -arch=sm_90a benchmarks/mma_rate.cu -o mma_rate && ./mma_rate
//
// Each warp multiplies m16n8k16 bfloat16 fragments into `chains` independent accumulators; `loads` ldmatrix.x4 accompany 8
// products (the forward kernel: 64 loads for 256 products of two row tiles, that is 2).
#include <cstdio>

#include "../csrc/cuda/ptx.h"

namespace tcam {

constexpr int rounds = 4096;

template <int chains, int loads>
__global__ void rate_kernel(float* out) {
  Shared shared;
  uint16_t* tile = shared.take<uint16_t>(32 * 64);
  for (int e = threadIdx.x; e < 32 * 64; e += blockDim.x) tile[e] = 0x3c00;
  __syncthreads();
  const int lane = threadIdx.x & 31;
  const uint16_t* row = tile + lane * 64;
  uint32_t a[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u},
           b[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
  float sum[chains][4] = {};
#pragma unroll 1
  for (int r = 0; r < rounds; ++r) {
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      if (q * loads % 8 < loads) ptx::load_matrices(b, row + ((q + lane) & 7) * 8);
      ptx::BFloat16::mma(sum[q % chains], a, b + 2 * (q & 1), sum[q % chains]);
    }
  }
  float total = 0.f;
  for (int c = 0; c < chains; ++c) total += sum[c][0] + sum[c][1] + sum[c][2] + sum[c][3];
  if (total == 1234.5f) *out = total;  // keeps the products
}

template <int chains, int loads>
cudaError_t measure(int warps, int processors, float* out, bool first) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  float best = 1e30f;
  for (int repeat = 0; repeat < 5; ++repeat) {
    cudaEventRecord(begin);
    launch(rate_kernel<chains, loads>, dim3(static_cast<unsigned>(processors)), static_cast<unsigned>(warps * 32), 8192,
           nullptr, out);
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    float ms = 0.f;
    cudaEventElapsedTime(&ms, begin, end);
    best = ms < best ? ms : best;
  }
  const double flop = 4096. * 8 * rounds * warps * processors;
  std::printf("%s{\"warps\": %d, \"chains\": %d, \"loads_per_8\": %d, \"tflops\": %.1f}", first ? "" : ",\n  ", warps, chains,
              loads, flop / best / 1e9);
  return cudaGetLastError();
}

}  // namespace tcam

int main() {
  int processors = 0;
  float* out = nullptr;
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess || cudaMalloc(&out, 4) != cudaSuccess) {
    std::fprintf(stderr, "mma_rate: no CUDA device\n");
    return 1;
  }
  processors = properties.multiProcessorCount;
  std::printf("{\"card\": \"%s\", \"processors\": %d, \"rates\": [\n  ", properties.name, processors);
  cudaError_t status = cudaSuccess;
  bool first = true;
  auto note = [&](cudaError_t found) {
    if (status == cudaSuccess) status = found;
    first = false;
  };
  for (int warps : {4, 8, 12, 16}) {
    note(tcam::measure<4, 0>(warps, processors, out, first));
    note(tcam::measure<8, 0>(warps, processors, out, first));
    note(tcam::measure<4, 2>(warps, processors, out, first));
    note(tcam::measure<8, 2>(warps, processors, out, first));
    note(tcam::measure<8, 4>(warps, processors, out, first));
  }
  std::printf("]}\n");
  if (status != cudaSuccess) std::fprintf(stderr, "mma_rate: %s\n", cudaGetErrorString(status));
  return status == cudaSuccess ? 0 : 1;
}
