// The kernels of fused_forward.cuh in float16: a file of their own, so that two formats compile at the same time.
#include "fused_forward.cuh"

namespace tcam {

cudaError_t fused_forward_float16(const FusedForward& p, const FusedForwardKind& kind, int products, const Device& device,
                                  cudaStream_t stream) {
  return launch_fused_forward<ptx::Float16>(p, kind, products, device, stream);
}

}  // namespace tcam
