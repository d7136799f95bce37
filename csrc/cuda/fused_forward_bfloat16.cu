// The kernels of fused_forward.cuh in bfloat16: a file of their own, so that two formats compile at the same time.
#include "fused_forward.cuh"

namespace tcam {

cudaError_t fused_forward_bfloat16(const FusedForward& p, const FusedForwardKind& kind, int products, const Device& device,
                                   cudaStream_t stream) {
  return launch_fused_forward<ptx::BFloat16>(p, kind, products, device, stream);
}

}  // namespace tcam
