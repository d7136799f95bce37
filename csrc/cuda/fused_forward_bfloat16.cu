// The kernels of fused_forward.h in bfloat16: a file of their own, so that two formats compile at the same time.
#include "fused_forward.h"

namespace tcam {

cudaError_t fused_forward_bfloat16(const FusedForward& p, int width, int products, const Device& device, cudaStream_t stream) {
  return choose_fused_forward<ptx::BFloat16>(p, width, products, device, stream);
}

}  // namespace tcam
