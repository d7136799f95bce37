// Measures the rates of a GPU's tensor cores through mma.sync and, on sm_90a, wgmma, with and without the matrix loads of fused
// kernels. These are the highest rates that such kernels can reach. Prints a line of JSON for each rate.
//
//     nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a benchmarks/mma_rate.cu -o mma_rate && ./mma_rate [MS]
//
// Operands are random, and each rate is measured over at least MS milliseconds (default: 200). Shorter runs and constant
// operands draw so little power that the clock stays above that of a real kernel.
//
// mma.sync: each warp multiplies m16n8k16 fragments into `chains` independent accumulators, with `loads` ldmatrix.x4 for every
// 8 products (2 in the forward kernel: 64 loads for 256 products). wgmma: each warpgroup multiplies m64n128k16 in groups of 8,
// with A in registers and B in shared memory, and `loads` ldmatrix.x4 per warp for every 8 products (12 in a forward kernel on
// wgmma).
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/cuda/ptx.cuh"

namespace tcam {

constexpr int tile_halves = 128 * 64;  // of shared memory: an operand of wgmma, 128 rows of 128 bytes

__device__ uint32_t random_halves(uint32_t seed) {  // two of about -1 to 1 in bfloat16
  uint32_t x = seed * 2654435761u + 12345u;
  x ^= x >> 15, x *= 2246822519u, x ^= x >> 13, x *= 3266489917u, x ^= x >> 16;
  const float lo = static_cast<float>(x & 0xffff) / 32768.f - 1.f, hi = static_cast<float>(x >> 16) / 32768.f - 1.f;
  return ptx::BFloat16::pack(lo, hi);
}

__device__ void fill(uint16_t* tile) {
  for (int e = threadIdx.x; e < tile_halves / 2; e += blockDim.x) {
    const uint32_t pair = random_halves(e * 7 + 1);
    tile[2 * e] = static_cast<uint16_t>(pair), tile[2 * e + 1] = static_cast<uint16_t>(pair >> 16);
  }
  __syncthreads();
}

template <int chains, int loads>
__global__ void mma_kernel(int rounds, float* out) {
  Shared shared;
  uint16_t* tile = shared.take<uint16_t>(tile_halves);
  fill(tile);
  const int lane = threadIdx.x & 31;
  const uint16_t* row = tile + lane * 64;
  uint32_t a[2][4], b[4];
  for (int r = 0; r < 4; ++r) {
    for (int m = 0; m < 2; ++m) a[m][r] = random_halves(threadIdx.x * 16 + m * 4 + r + 99);
    b[r] = random_halves(threadIdx.x * 16 + r + 999);
  }
  float sum[chains][4] = {};
#pragma unroll 1
  for (int r = 0; r < rounds; ++r) {
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      if (q * loads % 8 < loads) ptx::load_matrices(b, row + ((q + lane) & 7) * 8);
      ptx::BFloat16::mma(sum[q % chains], a[q >> 2], b + 2 * (q & 1), sum[q % chains]);
    }
  }
  float total = 0.f;
  for (int c = 0; c < chains; ++c) total += sum[c][0] + sum[c][1] + sum[c][2] + sum[c][3];
  if (total == 1234.5f) *out = total;  // keeps the products
}

// ---- wgmma -----------------------------------------------------------------------------------------

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TCAM_WGMMA 1
#endif

#if defined(TCAM_WGMMA)
__device__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// B: 128 rows (n) of 64 columns (k) of bfloat16, 128-byte swizzle, at 1024 bytes; the 16 columns from 16 k16 on.
__device__ uint64_t wgmma_descriptor(const uint16_t* panel, int k16) {
  const uint64_t at = ptx::shared_address(panel) + static_cast<uint32_t>(k16) * 32;
  return (at & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#define TCAM_R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TCAM_R16(i) TCAM_R4(i), TCAM_R4(i + 4), TCAM_R4(i + 8), TCAM_R4(i + 12)
// d (64 x 128) += A (64 x 16, in registers as those of mma.sync, 16 rows a warp) B^T.
__device__ void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"
      "%62,%63}, {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
      : TCAM_R16(0), TCAM_R16(16), TCAM_R16(32), TCAM_R16(48)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif

template <int loads>
__global__ void wgmma_kernel(int rounds, float* out) {
#if defined(TCAM_WGMMA)
  Shared shared;
  uint16_t* tile = shared.take<uint16_t>(tile_halves + 512);
  tile += (1024 - (ptx::shared_address(tile) & 1023)) % 1024 / 2;
  fill(tile);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const int lane = threadIdx.x & 31;
  uint32_t a[2][4], b[4] = {};
  for (int r = 0; r < 4; ++r)
    for (int m = 0; m < 2; ++m) a[m][r] = random_halves(threadIdx.x * 16 + m * 4 + r + 99);
  float sum[64] = {};
  uint32_t seen = 0;
#pragma unroll 1
  for (int r = 0; r < rounds; ++r) {
    wgmma_fence();
#pragma unroll
    for (int q = 0; q < 8; ++q) wgmma(sum, a[q & 1], wgmma_descriptor(tile, q & 3));
    wgmma_commit();
#pragma unroll
    for (int q = 0; q < loads; ++q) {
      ptx::load_matrices(b, tile + (lane + q % 4 * 32) * 64 + ((q + lane) & 7) * 8);
      seen ^= b[0] ^ b[1] ^ b[2] ^ b[3];
    }
    wgmma_wait();
  }
  float total = seen == 12345u ? 1.f : 0.f;
  for (int c = 0; c < 64; ++c) total += sum[c];
  if (total == 1234.5f) *out = total;
#else
  (void)rounds, (void)out;
#endif
}

// One product, for a look at the descriptor: out (64, 128) from a (64, 16) and b (128, 16), rows of bfloat16.
__global__ void wgmma_once(const uint16_t* a, const uint16_t* b, float* out) {
#if defined(TCAM_WGMMA)
  Shared shared;
  uint16_t* tile = shared.take<uint16_t>(tile_halves + 512);
  tile += (1024 - (ptx::shared_address(tile) & 1023)) % 1024 / 2;
  constexpr int k16 = 2;
  for (int e = threadIdx.x; e < 128 * 16; e += blockDim.x) {
    const int n = e / 16, k = k16 * 16 + e % 16;
    tile[n * 64 + (((k >> 3) ^ (n & 7)) << 3) + (k & 7)] = b[e];
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  uint32_t fragment[4];
  for (int r = 0; r < 4; ++r) {
    const uint16_t* at = a + (warp * 16 + g + 8 * (r & 1)) * 16 + 8 * (r >> 1) + 2 * t;
    fragment[r] = at[0] | static_cast<uint32_t>(at[1]) << 16;
  }
  float d[64] = {};
  wgmma_fence();
  wgmma(d, fragment, wgmma_descriptor(tile, k16));
  wgmma_commit();
  wgmma_wait();
  for (int c = 0; c < 64; ++c) out[(warp * 16 + g + 8 * (c >> 1 & 1)) * 128 + c / 4 * 8 + 2 * t + (c & 1)] = d[c];
#else
  (void)a, (void)b, (void)out;
#endif
}

// ---- the host --------------------------------------------------------------------------------------

struct Bench {
  int processors;
  float* out;
  double milliseconds;

  // Launches until the time is full; the first, alone, is a warm-up.
  template <class Kernel>
  cudaError_t measure(const char* what, Kernel kernel, int warps, int chains, int loads, double flop_a_round) {
    cudaEvent_t begin, end;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    const size_t shared = 2 * (tile_halves + 512) + 256;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    auto run = [&](int rounds, int launches) {
      cudaEventRecord(begin);
      for (int n = 0; n < launches && status == cudaSuccess; ++n)
        status = launch(kernel, dim3(static_cast<unsigned>(processors)), static_cast<unsigned>(warps * 32), shared, nullptr,
                        rounds, out);
      cudaEventRecord(end);
      if (status == cudaSuccess) status = cudaEventSynchronize(end);
      float ms = 0.f;
      cudaEventElapsedTime(&ms, begin, end);
      return static_cast<double>(ms);
    };
    constexpr int rounds = 20000;
    const double once = run(rounds, 1);
    const int launches = once > 0 ? static_cast<int>(milliseconds / once) + 1 : 1;
    const double ms = run(rounds, launches);
    if (status != cudaSuccess) {
      std::printf("{\"what\": \"%s\", \"error\": \"%s\"}\n", what, cudaGetErrorString(status));
    } else {
      std::printf("{\"what\": \"%s\", \"warps\": %d, \"chains\": %d, \"loads_per_8\": %d, \"tflops\": %.1f, \"ms\": %.0f}\n",
                  what, warps, chains, loads, flop_a_round * rounds * launches * processors / ms / 1e9, ms);
    }
    std::fflush(stdout);
    return status;
  }
};

float widen(uint16_t x) {
  const uint32_t u = static_cast<uint32_t>(x) << 16;
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

// The largest difference of wgmma_once from the product on the host.
cudaError_t check_wgmma() {
  std::vector<uint16_t> a(64 * 16), b(128 * 16);
  for (size_t e = 0; e < a.size(); ++e) a[e] = static_cast<uint16_t>(0x3f80 + (e * 37 & 0x7f) + (e % 3 == 0 ? 0x8000 : 0));
  for (size_t e = 0; e < b.size(); ++e) b[e] = static_cast<uint16_t>(0x3f00 + (e * 53 & 0x7f) + (e % 5 == 0 ? 0x8000 : 0));
  uint16_t *da = nullptr, *db = nullptr;
  float* dout = nullptr;
  std::vector<float> out(64 * 128);
  cudaMalloc(&da, a.size() * 2), cudaMalloc(&db, b.size() * 2), cudaMalloc(&dout, out.size() * 4);
  cudaMemcpy(da, a.data(), a.size() * 2, cudaMemcpyHostToDevice);
  cudaMemcpy(db, b.data(), b.size() * 2, cudaMemcpyHostToDevice);
  cudaMemset(dout, 0xff, out.size() * 4);
  cudaError_t status = launch(wgmma_once, dim3(1), 128, 2 * (tile_halves + 512) + 256, nullptr, da, db, dout);
  if (status == cudaSuccess) status = cudaMemcpy(out.data(), dout, out.size() * 4, cudaMemcpyDeviceToHost);
  double worst = 0;
  for (int i = 0; i < 64; ++i)
    for (int n = 0; n < 128; ++n) {
      double want = 0;
      for (int k = 0; k < 16; ++k)
        want += static_cast<double>(widen(a[i * 16 + k])) * static_cast<double>(widen(b[n * 16 + k]));
      const double error = fabs(static_cast<double>(out[i * 128 + n]) - want);
      if (!(error <= worst)) worst = error == error ? error : 1e30;
    }
  std::printf("{\"what\": \"wgmma check\", \"largest_error\": %.3g, \"status\": \"%s\"}\n", worst, cudaGetErrorString(status));
  std::fflush(stdout);
  cudaFree(da), cudaFree(db), cudaFree(dout);
  return status == cudaSuccess && worst > 1e-3 ? cudaErrorUnknown : status;
}

}  // namespace tcam

int main(int argc, char** argv) {
  float* out = nullptr;
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess || cudaMalloc(&out, 4) != cudaSuccess) {
    std::fprintf(stderr, "mma_rate: no CUDA device\n");
    return 1;
  }
  const tcam::Bench bench = {properties.multiProcessorCount, out, argc > 1 ? std::atof(argv[1]) : 200.};
  std::printf("{\"card\": \"%s\", \"processors\": %d}\n", properties.name, bench.processors);
  cudaError_t status = cudaSuccess;
  auto note = [&](cudaError_t found) { status = status == cudaSuccess ? found : status; };
  tcam::Bench b = bench;
  auto mma = [&](auto kernel, int warps, int chains, int loads) {
    note(b.measure("mma.sync", kernel, warps, chains, loads, 4096. * 8 * warps));
  };
  for (int warps : {4, 8, 12, 16}) {
    mma(tcam::mma_kernel<4, 0>, warps, 4, 0);
    mma(tcam::mma_kernel<8, 0>, warps, 8, 0);
    mma(tcam::mma_kernel<8, 2>, warps, 8, 2);
  }
  mma(tcam::mma_kernel<4, 2>, 12, 4, 2);
  mma(tcam::mma_kernel<8, 4>, 12, 8, 4);
  if (properties.major == 9) {
    note(tcam::check_wgmma());
    for (int warps : {4, 8, 12}) {
      const double flop = 2. * 64 * 128 * 16 * 8 * warps / 4;
      note(b.measure("wgmma", tcam::wgmma_kernel<0>, warps, 1, 0, flop));
      note(b.measure("wgmma", tcam::wgmma_kernel<8>, warps, 1, 8, flop));
      note(b.measure("wgmma", tcam::wgmma_kernel<12>, warps, 1, 12, flop));
    }
  }
  if (status != cudaSuccess) std::fprintf(stderr, "mma_rate: %s\n", cudaGetErrorString(status));
  return status == cudaSuccess ? 0 : 1;
}
