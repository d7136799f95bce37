// The ops beside the decode: linear interpolation along one axis of an array and its adjoint (sample_grid), and standard
// normals (the noise of texels).
#include "../maths/bilinear.h"
#include "../problem.h"
#include "device.cuh"
#include "launch.h"

namespace tcam {
namespace {

constexpr int threads = 256, most_texel_blocks = 1024;

// The axis that is interpolated, in arrays (outer, axis, inner): n voxels from `lo` on, of `size` in all, and axis.texels
// texels. ascending: whether the taps' texels ascend with the voxels.
struct Along {
  int64_t outer, inner, n, size, lo;
  Axis axis;
  bool corners, ascending;
  TCAM_DEVICE Tap<double> tap(int64_t i, const double* bounds) const { return voxel_tap(axis, lo + i, size, corners, bounds); }
};

// out (outer, n, inner) = in (outer, texels, inner) interpolated at the voxels. bounds (2): the coordinates that the axis runs
// from and to; null: -1 and 1. A thread owns an element.
template <class Real>
__global__ void __launch_bounds__(threads) resample_kernel(Along a, const double* bounds, const Real* in, Real* out) {
  const int64_t count = a.outer * a.n * a.inner;
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t x = e % a.inner, i = e / a.inner % a.n, o = e / a.inner / a.n;
    const Tap<double> t = a.tap(i, bounds);
    const Real* from = in + o * a.axis.texels * a.inner + x;
    out[e] = static_cast<Real>(t.w_lo) * from[t.lo * a.inner] + static_cast<Real>(t.w_hi) * from[t.hi * a.inner];
  }
}

// The adjoint of resample_kernel: out (outer, texels, inner) from in (outer, n, inner). The blocks of one row of the grid
// (blockIdx.y) own a texel, their threads its elements; each sums the voxels that read the texel in ascending order, so no sum
// needs atomics. These voxels are neighbours where the taps ascend; where they do not, every voxel is tested.
template <class Real>
__global__ void __launch_bounds__(threads) resample_adjoint_kernel(Along a, const double* bounds, const Real* in, Real* out) {
  Shared shared;
  int64_t* range = shared.take<int64_t>(2);
  for (int64_t r = blockIdx.y; r < a.axis.texels; r += gridDim.y) {
    if (threadIdx.x < 2) {  // the first voxel whose tap has lo >= r - 1 (thread 0) or lo >= r + 1 (thread 1)
      int64_t lo = 0, hi = a.n;
      if (!a.ascending) lo = hi = threadIdx.x ? a.n : 0;
      while (lo < hi) {
        const int64_t middle = (lo + hi) / 2;
        if (a.tap(middle, bounds).lo < r - 1 + 2 * static_cast<int64_t>(threadIdx.x))
          lo = middle + 1;
        else
          hi = middle;
      }
      range[threadIdx.x] = lo;
    }
    __syncthreads();
    const int64_t begin = range[0], end = range[1];
    for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < a.outer * a.inner;
         e += static_cast<int64_t>(gridDim.x) * threads) {
      const int64_t x = e % a.inner, o = e / a.inner;
      Real sum = 0;
      for (int64_t i = begin; i < end; ++i) {
        const Tap<double> t = a.tap(i, bounds);
        const double w = (t.lo == r ? t.w_lo : 0.) + (t.hi == r ? t.w_hi : 0.);
        if (w != 0) sum += static_cast<Real>(w) * in[(o * a.n + i) * a.inner + x];
      }
      out[(o * a.axis.texels + r) * a.inner + x] = sum;
    }
    __syncthreads();  // range is read
  }
}

template <class Real>
cudaError_t resample(const tcam_resample& p, const double* bounds, const void* in, void* out, cudaStream_t stream) {
  const Along a = {p.outer,        p.inner,
                   p.hi - p.lo,    p.size,
                   p.lo,           {static_cast<int>(p.texels), p.align_corners != 0, p.padding},
                   p.corners != 0, p.padding != TCAM_PAD_REFLECTION && !bounds};
  auto blocks = [](int64_t elements, int64_t most) {
    const int64_t wanted = (elements + threads - 1) / threads;
    return static_cast<unsigned>(wanted < most ? wanted : most);
  };
  const Real* from = static_cast<const Real*>(in);
  if (!p.adjoint)
    return launch(resample_kernel<Real>, blocks(a.outer * a.n * a.inner, 65535), threads, 0, stream, a, bounds, from,
                  static_cast<Real*>(out));
  const dim3 grid(blocks(a.outer * a.inner, 1024), blocks(p.texels * threads, most_texel_blocks));
  return launch(resample_adjoint_kernel<Real>, grid, threads, 2 * sizeof(int64_t) + 16, stream, a, bounds, from,
                static_cast<Real*>(out));
}

// out (objects, count) = standard normals of n's seed and sequence. A thread owns a Philox block of an object: four numbers.
__global__ void __launch_bounds__(threads) normals_kernel(tcam_normals n, float* out) {
  const int64_t blocks = noise_blocks(n.count);
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < n.objects * blocks;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t object = e / blocks, b = e % blocks;
    float word[4];
    Noise<ScalarNoise>::block({n.seed, 0, static_cast<uint32_t>(object), static_cast<uint32_t>(n.sequence)},
                              static_cast<uint32_t>(b), word);
#pragma unroll
    for (int w = 0; w < 4; ++w)
      if (w * blocks + b < n.count) out[object * n.count + w * blocks + b] = word[w];
  }
}

}  // namespace
}  // namespace tcam

extern "C" int tcam_resample_axis_cuda(const tcam_resample* problem, const double bounds[2], const void* in, void* out,
                                       int device, void* stream) {
  tcam::DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  return problem->dtype == TCAM_F64 ? tcam::resample<double>(*problem, bounds, in, out, s)
                                    : tcam::resample<float>(*problem, bounds, in, out, s);
}

extern "C" int tcam_normals_cuda(const tcam_normals* normals, float* out, int device, void* stream) {
  tcam::DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const int64_t wanted = (normals->objects * tcam::noise_blocks(normals->count) + tcam::threads - 1) / tcam::threads;
  return tcam::launch(tcam::normals_kernel, static_cast<unsigned>(wanted < 65535 ? wanted : 65535), tcam::threads, 0,
                      static_cast<cudaStream_t>(stream), *normals, out);
}

extern "C" int tcam_cuda_info(int* runtime, int* driver, int* devices) {
  cudaRuntimeGetVersion(runtime);
  cudaDriverGetVersion(driver);
  return cudaGetDeviceCount(devices);
}

extern "C" const char* tcam_cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
