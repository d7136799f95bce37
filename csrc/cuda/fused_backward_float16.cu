// The fused backward kernels in float16, in a file of their own so that both formats compile in parallel.
#include "fused_backward.cuh"

namespace tcam {

cudaError_t fused_backward_float16(const FusedBackward& p, int width, bool warpgroups, int blocks, cudaStream_t stream) {
  return launch_fused_backward<ptx::Float16>(p, width, warpgroups, blocks, stream);
}

}  // namespace tcam
