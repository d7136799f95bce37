// The fused backward kernel, for the decoders of fused_forward.cuh, with float32 sums.
//
//     delta_L = dl/dy;  delta_l = (delta_(l+1) W_(l+1)) * (h_l > 0);  dW_l = sum over voxels of delta_l h_(l-1)^T
//
// The weight gradients of all layers need more accumulators than an SM has registers. Each launch therefore computes the weight
// gradient of one layer, from the top layer down, and recomputes the activations that it needs. The first launch,
// `head`, computes all layers forward and the loss, and stores dl/dy and bit masks of where each h_l is positive; the masks are
// all that later launches need of the layers above theirs. The last launch, that of layer 2, also computes delta_1 and writes
// it in 16 bits; grid.cuh or fused_rows.cuh reads it from there. With P products between hidden layers, the launches together
// do P P + 2 products a voxel.
//
// A block has chain warps, for four tiles at a time, and four outer warps. Chain warps take their tiles through the layers,
// forward and back, as the forward kernel's warps do, and write each tile's h_(l-1) and delta_l to shared memory. The four
// outer warps each have a quarter of dW_l in registers and add the outer products of these tiles, in the order of steps and
// tiles, so that every sum has one order. Each scheduler has one or two chain warps and an outer warp, so outer products run
// while the chain's dependent products wait.
//
// With one output, row r of delta_(P+1) is dy w_r mask_r. The kernel leaves out the factor w_r from dW_(P+1) and db_(P+1);
// combine_top_kernel multiplies it in, and computes the gradient of w from the same sums. The walk back correspondingly begins
// with diag(w) W_(P+1) in place of W_(P+1).
#pragma once
#include "fused_backward_chain.cuh"
#include "fused_backward_outer.cuh"

namespace tcam {

template <class T, int N, int MT>
struct FusedBackwardKernel : FusedBackwardBlock<T, N, MT> {
  using Base = FusedBackwardBlock<T, N, MT>;
  using Base::chain_threads, Base::threads, Base::forward_products, Base::back_products;
  using typename Base::Team, typename Base::Memory;
  static constexpr int width = N, row_blocks = MT;

  // Loads the launch's panels, biases and last layer to shared memory; then the warps divide into chain and outer warps.
  TCAM_DEVICE static void run(const FusedBackward& p) {
    Shared shared;
    const Memory memory(shared, p);
    const int tid = threadIdx.x, forward = forward_products(p), back = back_products(p);
    for (int q = 0; q < forward; ++q)
      Team::stage_panel(memory.panels + q * N * N, p.weights + static_cast<size_t>(q) * N * N, tid, threads);
    for (int q = 0; q < back; ++q)
      Team::stage_panel(memory.panels + (forward + q) * N * N, p.weights_back + static_cast<size_t>(p.products - 1 - q) * N * N,
                        tid, threads);
    ptx::commit_copies();
    const float last_scale = p.last_scale ? *p.last_scale : 1.f;
    for (int c = tid; c < p.products * N; c += threads) memory.biases[c] = p.biases[c];
    Team::split_last(memory.split_last, p.last, p.n_out, tid, threads);
    for (int c = tid; c < fused_most_out * N; c += threads) memory.last[c] = c < p.n_out * N ? p.last[c] * last_scale : 0.f;
    if (tid < fused_most_out) memory.last_bias[tid] = p.last_bias[p.n_out == 1 ? 0 : tid < p.n_out ? tid : 0];
    Team::wait_panels();
    __syncthreads();
    if (tid < chain_threads)
      FusedBackwardChain<T, N, MT>::chain(p, memory);
    else if (p.weighted)
      FusedBackwardOuter<T, N, MT>::outer(p, memory);
  }
};

// One block for each multiprocessor; each walks an equal range of the steps. The first chain_threads threads are the chain
// warps.
template <class T, int N, int MT>
__global__ void __launch_bounds__(FusedBackwardKernel<T, N, MT>::threads, 1) fused_backward_kernel(FusedBackward p) {
  FusedBackwardKernel<T, N, MT>::run(p);
}

// Calls f with the kernel's struct for a width (64 or 128) and a device.
template <class T, class F>
auto with_fused_backward(int width, bool warpgroups, F f) {
  if (warpgroups) return width == 64 ? f(FusedBackwardKernel<T, 64, 1>()) : f(FusedBackwardKernel<T, 128, 1>());
  return width == 64 ? f(FusedBackwardKernel<T, 64, 2>()) : f(FusedBackwardKernel<T, 128, 2>());
}

// The number of steps of four tiles of a launch over these maps. Kernels with teams of two tiles have at most twice as many.
inline int fused_backward_steps(const FusedMaps& maps) {
  return FusedBackwardKernel<ptx::BFloat16, 128, 2>::Team::Steps(maps, 0, 1).count();
}

// The threads of a block's chain warps, and its bytes of dynamic shared memory.
inline int fused_backward_chain_threads(bool warpgroups) {
  return with_fused_backward<ptx::BFloat16>(128, warpgroups, [](auto kernel) { return decltype(kernel)::chain_threads; });
}
inline size_t fused_backward_bytes(const FusedBackward& p, int width, bool warpgroups) {
  return with_fused_backward<ptx::BFloat16>(width, warpgroups, [&](auto kernel) { return decltype(kernel)::shared_bytes(p); });
}

// Launches the kernel for a width and a device. blocks <= fused_backward_steps(p.maps) and blocks <= fused_most_blocks.
template <class T>
cudaError_t launch_fused_backward(const FusedBackward& p, int width, bool warpgroups, int blocks, cudaStream_t stream) {
  return with_fused_backward<T>(width, warpgroups, [&](auto kind) {
    using Kernel = decltype(kind);
    const size_t bytes = Kernel::shared_bytes(p);
    auto kernel = fused_backward_kernel<T, Kernel::width, Kernel::row_blocks>;
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status != cudaSuccess) return status;
    return launch(kernel, dim3(static_cast<unsigned>(blocks)), Kernel::threads, bytes, stream, p);
  });
}

cudaError_t fused_backward_bfloat16(const FusedBackward& p, int width, bool warpgroups, int blocks, cudaStream_t stream);
cudaError_t fused_backward_float16(const FusedBackward& p, int width, bool warpgroups, int blocks, cudaStream_t stream);

}  // namespace tcam
