// Backward of the fused kernels: ReLU decoders of hidden widths to 128 in bfloat16 or float16, float32 sums.
//
//     delta_L = dl/dy;  delta_l = (delta_(l+1) W_(l+1)) * (h_l > 0);  dW_l = sum over voxels of delta_l h_(l-1)^T
//
// The weight gradients of all layers are more accumulators than an SM has registers. So one launch computes the gradient of one
// layer, from the last hidden one down, and what its voxels need of the other layers is recomputed: the first launch (`head`)
// walks all layers forward, compares with the target, and leaves behind dl/dy and, as bits, where each h_l is positive; those
// bits are all that the later launches need of the layers above theirs. The last launch goes on to delta_1, which leaves in 16
// bits for the sums over k, i and j. With P products between hidden layers the launches do P P + 2 products a voxel.
//
// A block has four chain warps, which walk tiles of voxels as the forward kernel's do, and four outer warps, each with a
// quarter of dW in its registers. A chain warp lays the h_(l-1) and delta_l of its tile into shared memory and goes on; the
// outer warps take the tiles in turn, so every sum has one order. Warp w and warp w + 4 share a scheduler: the outer products
// fill the gaps that a chain of dependent layers leaves on the tensor core.
//
// With one output, delta_P+1 = dy w mask: dW is then summed without the factor w of its row, which the kernel that combines the
// blocks' sums multiplies in (and which gives the gradient of w itself: combine_top_kernel), and the walk down begins with
// diag(w) W in the place of W.
#pragma once
#include "fused_backward_chain.cuh"
#include "fused_backward_outer.cuh"

namespace tcam {

template <class T, int N>
struct FusedBackwardKernel : FusedBackwardBlock<T, N> {
  using Base = FusedBackwardBlock<T, N>;
  using Base::chain_threads, Base::threads, Base::forward_products, Base::back_products;
  using typename Base::Block, typename Base::Memory;

  TCAM_DEVICE static void run(const FusedBackward& p) {
    Shared shared;
    const Memory memory(shared, p);
    const int tid = threadIdx.x, forward = forward_products(p), back = back_products(p);
    Block::stage_rows(memory.panels, p.weights, forward * N, tid, threads);
    for (int q = 0; q < back; ++q) {
      const int layer = p.products + 1 - q;
      Block::stage_rows(memory.panels + (forward + q) * N * N,
                        q == 0 ? p.top : p.weights + static_cast<size_t>(layer - 2) * N * N, N, tid, threads);
    }
    ptx::commit_copies();
    const float last_scale = p.last_scale ? *p.last_scale : 1.f;
    for (int c = tid; c < p.products * N; c += threads) memory.biases[c] = p.biases[c];
    Block::split_last(memory.split_last, p.last, p.n_out, tid, threads);
    for (int c = tid; c < fused_most_out * N; c += threads) memory.last[c] = c < p.n_out * N ? p.last[c] * last_scale : 0.f;
    if (tid < fused_most_out) memory.last_bias[tid] = p.last_bias[p.n_out == 1 ? 0 : tid < p.n_out ? tid : 0];
    ptx::wait_copies();
    __syncthreads();
    const typename Block::Steps all(p.maps, blockIdx.x, gridDim.x);
    if (tid < chain_threads)
      FusedBackwardChain<T, N>::chain(p, memory, all);
    else if (p.weighted)
      FusedBackwardOuter<T, N>::outer(p, memory, all);
  }
};

template <class T, int N>
__global__ void __launch_bounds__(FusedBackwardKernel<T, N>::threads, 1) fused_backward_kernel(FusedBackward p) {
  FusedBackwardKernel<T, N>::run(p);
}

constexpr int fused_backward_chain_threads = FusedBackwardKernel<ptx::BFloat16, 128>::chain_threads;

// Of one launch, whatever the width.
inline int fused_backward_steps(const FusedMaps& maps) {
  return FusedBackwardKernel<ptx::BFloat16, 128>::Block::Steps(maps, 0, 1).count();
}

// Of shared memory that a block takes.
inline size_t fused_backward_bytes(const FusedBackward& p, int width) {
  using Narrow = FusedBackwardKernel<ptx::BFloat16, 64>;
  using Wide = FusedBackwardKernel<ptx::BFloat16, 128>;
  return width == 64 ? Narrow::shared_bytes(p) : Wide::shared_bytes(p);
}

template <class T, int N>
cudaError_t launch_fused_backward(const FusedBackward& p, int blocks, cudaStream_t stream) {
  using Kernel = FusedBackwardKernel<T, N>;
  const size_t bytes = Kernel::shared_bytes(p);
  auto kernel = fused_backward_kernel<T, N>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status != cudaSuccess) return status;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), Kernel::threads, bytes, stream, p);
}

// `blocks`: at most the steps and fused_most_blocks.
template <class T>
cudaError_t choose_fused_backward(const FusedBackward& p, int width, int blocks, cudaStream_t stream) {
  return width == 64 ? launch_fused_backward<T, 64>(p, blocks, stream) : launch_fused_backward<T, 128>(p, blocks, stream);
}

cudaError_t fused_backward_bfloat16(const FusedBackward& p, int width, int blocks, cudaStream_t stream);
cudaError_t fused_backward_float16(const FusedBackward& p, int width, int blocks, cudaStream_t stream);

}  // namespace tcam
