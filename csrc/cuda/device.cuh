// The base of every kernel file: launches, dynamic shared memory, the device guard, scalar arithmetic for maths/*.h. The
// emulator in tests/simt brings its own <cuda_runtime.h>, so that the same files run on a CPU under the sanitizers.
#pragma once
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../maths/activation.h"
#include "../maths/bilinear.h"
#include "../maths/noise.h"

#define TCAM_DEVICE __device__ __forceinline__
#if defined(TCAM_SIMT)
#define TCAM_OUT_OF_LINE __attribute__((noinline))
#else
#define TCAM_OUT_OF_LINE __device__ __noinline__
#endif

namespace tcam {

// The properties of a device that the choice of kernels depends on.
struct Device {
  int shared_limit;  // bytes of shared memory that a block may have
  int processors;    // streaming multiprocessors
  bool warpgroups;   // whether the kernels that multiply with wgmma run here: sm_90, from code for sm_90a
};

// The reason why kernels do not take a problem: `why` is a printf format that reads `got` and `most`. A null `why` means that
// they take it.
struct Refusal {
  const char* why;
  long long got, most;
};

// Launches kernel(arguments...) on `stream` and returns the status of the launch; it does not wait for the kernel.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t stream,
                   A... arguments) {
#if defined(TCAM_SIMT)
  (void)stream;
  simt::launch({grid.x, grid.y, grid.z}, {threads, 1, 1}, shared_bytes, [=] { kernel(static_cast<P>(arguments)...); });
  return cudaSuccess;
#else
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
#endif
}

// An allocator of the block's dynamic shared memory. All threads must take the same arrays in the same order.
class Shared {
 public:
#if defined(TCAM_SIMT)
  template <class T>
  T* take(int count) {
    return static_cast<T*>(simt::machine->take_shared(count * sizeof(T)));
  }
#else
  TCAM_DEVICE Shared() {
    extern __shared__ __align__(1024) char memory[];  // as the operands of wgmma need it
    at_ = memory;
  }
  template <class T>
  TCAM_DEVICE T* take(int count) {
    T* p = reinterpret_cast<T*>(at_);
    at_ += (count * sizeof(T) + 15) & ~size_t(15);
    return p;
  }

 private:
  char* at_;
#endif
};

// Makes `device` current for the guard's lifetime, then restores the caller's device.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&before_);
    if (status_ == cudaSuccess && before_ != device) {
      status_ = cudaSetDevice(device);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  cudaError_t status() const { return status_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

// Scalar arithmetic, the `M` of maths/activation.h and maths/loss.h.
template <class Real>
struct Scalar {
  using V = Real;
  TCAM_MATHS V splat(double x) { return static_cast<Real>(x); }
  TCAM_MATHS V select(bool mask, V a, V b) { return mask ? a : b; }
  TCAM_MATHS float exp(float x) { return ::expf(x); }
  TCAM_MATHS float log1p(float x) { return ::log1pf(x); }
  TCAM_MATHS float tanh(float x) { return ::tanhf(x); }
  TCAM_MATHS float sin(float x) { return ::sinf(x); }
  TCAM_MATHS float cos(float x) { return ::cosf(x); }
  TCAM_MATHS float normal_cdf(float x) { return 0.5f * ::erfcf(x * -0.70710678f); }
  TCAM_MATHS double exp(double x) { return ::exp(x); }
  TCAM_MATHS double log1p(double x) { return ::log1p(x); }
  TCAM_MATHS double tanh(double x) { return ::tanh(x); }
  TCAM_MATHS double sin(double x) { return ::sin(x); }
  TCAM_MATHS double cos(double x) { return ::cos(x); }
  TCAM_MATHS double normal_cdf(double x) { return 0.5 * ::erfc(x * -0.7071067811865476); }
};

// Scalar arithmetic, the `M` of maths/noise.h.
struct ScalarNoise {
  using V = float;
  using U = uint32_t;
  using I = int32_t;
  TCAM_MATHS V splat(float x) { return x; }
  TCAM_MATHS U splat(uint32_t x) { return x; }
  TCAM_MATHS V to_float(I i) { return static_cast<float>(i); }
  TCAM_MATHS V fma(V a, V b, V c) { return ::fmaf(a, b, c); }
  TCAM_MATHS V sqrt(V x) { return ::sqrtf(x); }
  TCAM_MATHS V select(I odd, V a, V b) { return odd ? a : b; }
  TCAM_MATHS U bits(V x) {
    U u;
    memcpy(&u, &x, sizeof u);
    return u;
  }
  TCAM_MATHS V floats(U u) {
    V x;
    memcpy(&x, &u, sizeof x);
    return x;
  }
  TCAM_MATHS void multiply(U a, uint32_t b, U& hi, U& lo) {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    hi = static_cast<U>(product >> 32), lo = static_cast<U>(product);
  }
};

// The output activation and its slope at z. All but `none` and `sigmoid` are calls out of line, so that they do not raise the
// kernel's register count. half_sine needs `sines`: its range reduction would cost registers even out of line, so the fused
// kernels pass false and refuse problems with half_sine.
template <bool sines, class Real>
TCAM_OUT_OF_LINE Real rare_output(Final<Real> a, Real z) {
  if (!sines && a.kind == OutputActivation::half_sine) return z;
  return Maths<Scalar<Real>>::output(a, z);
}
template <bool sines, class Real>
TCAM_OUT_OF_LINE Real rare_output_slope(Final<Real> a, Real z) {
  if (!sines && a.kind == OutputActivation::half_sine) return z;
  return Maths<Scalar<Real>>::output_slope(a, z);
}
TCAM_DEVICE bool is_rare(OutputActivation a) { return a != OutputActivation::none && a != OutputActivation::sigmoid; }
template <bool sines, class Real>
TCAM_DEVICE Real output_of(Final<Real> a, Real z) {
  if (is_rare(a.kind)) return rare_output<sines>(a, z);
  return a.kind == OutputActivation::none ? z : Maths<Scalar<Real>>::sigmoid(z);
}
template <bool sines, class Real>
TCAM_DEVICE Real output_slope_of(Final<Real> a, Real z) {
  if (is_rare(a.kind)) return rare_output_slope<sines>(a, z);
  return a.kind == OutputActivation::none ? Real(1) : Maths<Scalar<Real>>::logistic_slope(z);
}

}  // namespace tcam
