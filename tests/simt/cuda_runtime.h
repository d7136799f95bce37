// CUDA's names for the emulator of simt.h, with which a host compiler compiles the .cu files of csrc/cuda.
#pragma once
#include <cstddef>

#include "simt.h"

#define TCAM_SIMT 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define threadIdx (simt::machine->current->index)
#define blockIdx (simt::machine->block_index)
#define blockDim (simt::machine->block)
#define gridDim (simt::machine->grid)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline void __syncthreads() { simt::machine->barrier(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  simt::machine->warp_function(1, mask, [](int) {});
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return simt::shuffle(2, mask, value, [=](int l) { return l ^ lanes; });
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  return simt::shuffle(3, mask, value, [=](int) { return lane; });
}

template <class T>
T atomicAdd(T* at, T value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  const int status = simt::failure;
  simt::failure = 0;
  return static_cast<cudaError_t>(status);
}
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int values[] = {simt::device.processors, simt::device.shared_limit, simt::device.warpgroups ? 9 : 8, 0};
  *value = values[attribute];
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }
inline cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* v) {
  *v = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  return cudaSuccess;
}
