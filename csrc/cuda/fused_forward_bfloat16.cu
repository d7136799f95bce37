// The fused forward kernels in bfloat16, in a file of their own so that both formats compile in parallel.
#include "fused_forward.cuh"

namespace tcam {

cudaError_t fused_forward_bfloat16(const FusedForward& p, const FusedForwardKind& kind, int products, const Device& device,
                                   cudaStream_t stream) {
  return launch_fused_forward<ptx::BFloat16>(p, kind, products, device, stream);
}

}  // namespace tcam
