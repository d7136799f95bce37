// Resampling of a channels-last plane to a grid of voxels: the maps A, B, G of decode_grid.
#include "../maths/bilinear.h"
#include "../problem.h"
#include "device.h"
#include "launch.h"

namespace tcam {
namespace {

// plane (m0, m1, channels) and out (n0, n1, channels), row-major, distinct. A block owns one
// voxel (i, j) at a time (grid-stride over n0*n1), its threads the channels: reads of the four
// texels and the write are coalesced, and the taps are computed once a voxel by every thread
// (a dozen double operations against a memory-bound row).
template <class Real>
__global__ void resample_plane_kernel(const Real* __restrict__ plane, int m0, int m1, int channels, long long n0, long long n1,
                                      bool align_corners, bool zeros, Real* __restrict__ out) {
  for (long long v = blockIdx.x; v < n0 * n1; v += gridDim.x) {
    const Taps t = linear_taps(v / n1, n0, m0, align_corners, zeros);
    const Taps u = linear_taps(v % n1, n1, m1, align_corners, zeros);
    const Real w00 = static_cast<Real>(t.w_lo * u.w_lo), w01 = static_cast<Real>(t.w_lo * u.w_hi),
               w10 = static_cast<Real>(t.w_hi * u.w_lo), w11 = static_cast<Real>(t.w_hi * u.w_hi);
    const Real* p00 = plane + (static_cast<long long>(t.lo) * m1 + u.lo) * channels;
    const Real* p01 = plane + (static_cast<long long>(t.lo) * m1 + u.hi) * channels;
    const Real* p10 = plane + (static_cast<long long>(t.hi) * m1 + u.lo) * channels;
    const Real* p11 = plane + (static_cast<long long>(t.hi) * m1 + u.hi) * channels;
    for (int c = threadIdx.x; c < channels; c += blockDim.x)
      out[v * channels + c] = w00 * p00[c] + w01 * p01[c] + w10 * p10[c] + w11 * p11[c];
  }
}

template <class Real>
cudaError_t resample(const void* plane, int64_t m0, int64_t m1, int64_t channels, int64_t n0, int64_t n1, bool align_corners,
                     bool zeros, void* out, cudaStream_t stream) {
  const int threads = channels >= 128 ? 128 : channels > 32 ? 64 : 32;
  const int64_t voxels = n0 * n1;
  const unsigned blocks = static_cast<unsigned>(voxels < 65536 ? voxels : 65536);
  return launch(resample_plane_kernel<Real>, blocks, threads, 0, stream, static_cast<const Real*>(plane), static_cast<int>(m0),
                static_cast<int>(m1), static_cast<int>(channels), n0, n1, align_corners, zeros, static_cast<Real*>(out));
}

}  // namespace
}  // namespace tcam

extern "C" int tcam_resample_plane_cuda(const void* plane, int64_t m0, int64_t m1, int64_t channels, int64_t n0, int64_t n1,
                                        int align_corners, int padding, int dtype, void* out, int device, void* stream) {
  tcam::DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const bool zeros = padding == TCAM_PAD_ZEROS;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  return dtype == TCAM_F64 ? tcam::resample<double>(plane, m0, m1, channels, n0, n1, align_corners, zeros, out, s)
                           : tcam::resample<float>(plane, m0, m1, channels, n0, n1, align_corners, zeros, out, s);
}

extern "C" int tcam_cuda_info(int* runtime, int* driver, int* devices) {
  cudaRuntimeGetVersion(runtime);
  cudaDriverGetVersion(driver);
  return cudaGetDeviceCount(devices);
}

extern "C" const char* tcam_cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
