// The fused forward kernel: all layers above the maps in one kernel on tensor cores. It takes ReLU decoders with hidden widths
// up to 128, up to 4 outputs, and one to three products between hidden layers, in bfloat16 or float16 with float32 sums.
//
//     h_1(i,j,k) = relu(A[i,j] + B[j,k] + G[i,k]);  h_l = relu(W_l h_(l-1) + b_l);  out = W_L h_(L-1) + b_L
//
// A block has WI x WJ tiles at a time (fused_tile.cuh). Shared memory has all weights, the column's tiles of G, and two buffers
// of B and A. h_1 of the next step is computed during the last product of the current one, so that the tensor cores do not wait
// for it.
#pragma once
#include "fused_tile.cuh"

namespace tcam {

constexpr int fused_most_products = 3;

// Arguments of fused_forward_kernel; N is the padded width, P = products.
struct FusedForward {
  FusedMaps maps;
  const uint16_t* weights;  // (P, N outputs, N inputs): W_2 to W_(P+1) in the 16-bit format
  const float* biases;      // (P, N): b_2 to b_(P+1)
  const float* last;        // (n_out, N): W_L
  const float* last_bias;   // (n_out) or null
  int n_out;
  Final<float> output_activation;
  void* volume;  // the output, (n_out, ni, nj, nk) with channel_stride from output to output
  int dtype;
  int64_t channel_stride;
};

// Bytes of dynamic shared memory of a block.
template <int N, int MT, int WI, int WJ, int products>
constexpr size_t fused_shared_bytes() {
  return 2 * (products * N * N + FusedBlock<float, N, MT, WI, WJ>::Stage::elements + 8 * N) + 4 * products * N + 128;
}

template <class T, int N, int MT, int WI, int WJ, int products>
struct FusedForwardKernel {
  using Block = FusedBlock<T, N, MT, WI, WJ>;
  static constexpr int threads = Block::threads, steps = Block::steps, lines = Block::lines, share = Block::share;

  // Loads the weights to shared memory, then walks the block's steps, column by column.
  TCAM_DEVICE static void run(const FusedForward& p) {
    Shared shared;
    uint16_t* sw = shared.take<uint16_t>(products * N * N);
    const typename Block::Stage stage(shared);
    uint16_t* slast = shared.take<uint16_t>(8 * N);
    float* sbias = shared.take<float>(products * N + fused_most_out);
    const Lane<N> lane;
    const int tid = threadIdx.x, warp = tid >> 5;

    for (int l = 0; l < products; ++l)
      Block::stage_panel(sw + l * N * N, p.weights + static_cast<size_t>(l) * N * N, tid, threads);
    ptx::commit_copies();
    for (int c = tid; c < products * N; c += threads) sbias[c] = p.biases[c];
    Block::split_last(slast, p.last, p.n_out, tid, threads);
    if (tid < fused_most_out) {
      const int o = p.n_out == 1 ? 0 : tid;
      sbias[products * N + tid] = p.last_bias && o < p.n_out ? p.last_bias[o] : 0.f;
    }

    const uint16_t* g_rows = stage.g_rows(warp);
    typename Block::Fragment h[2];
    constexpr int in = (products - 1) & 1;  // which h the last product takes; h_1 of the next step goes to the other
    // With wgmma and one product, h_1 waits for the end of the product, which reads the registers it ends in.
    constexpr bool late = MT == 1 && products == 1;
    // After the last step of a column this reads stale tiles; the result is not used.
    auto next_first = [&](int s, int buffer) {
      Block::first_layer(h[in ^ 1], s, stage.a_row(warp, buffer), stage.b_rows(warp, buffer), g_rows, lane);
    };
    const typename Block::Steps all(p.maps, blockIdx.x, gridDim.x);
    for (int s = all.begin; s < all.end;) {
      const typename Block::Column column(all, s);
      const int j_first = column.j_first, j_last = column.j_last;
      s += j_last - j_first;
      __syncthreads();  // all warps have finished the column before
      Block::stage_column(stage, p.maps, column, tid);
      Block::stage_step(stage, p.maps, column, j_first, 0, tid);
      Block::wait_panels();
      __syncthreads();
      if (j_last - j_first > 1) Block::stage_step(stage, p.maps, column, j_first + 1, 1, tid);
#pragma unroll
      for (int q = 0; q < steps; ++q) Block::first_layer(h[0], q, stage.a_row(warp, 0), stage.b_rows(warp, 0), g_rows, lane);
#pragma unroll 1
      for (int jb = j_first; jb < j_last; ++jb) {
        const int next = (jb - j_first + 1) & 1;
#pragma unroll
        for (int l = 0; l + 1 < products; ++l)
          Block::template multiply<1>(
              h[l & 1], sw + l * N * N, sbias + l * N, lane, [](int) {},
              [&](int s, int m, const float (&sum)[2][4]) { Block::to_operand(h[(l + 1) & 1][m][s], sum); });
        float out[MT][4];
        const float last_bias = sbias[products * N + lane.t];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          out[m][0] = out[m][2] = last_bias;
          out[m][1] = out[m][3] = 0.f;
        }
        Block::template multiply<1>(
            h[in], sw + (products - 1) * N * N, sbias + (products - 1) * N, lane,
            [&](int s) {
              if (s == 0) {
                ptx::wait_copies();
                __syncthreads();  // step jb + 1 has arrived, and all warps have read step jb
                if (jb + 2 < j_last) Block::stage_step(stage, p.maps, column, jb + 2, next ^ 1, tid);
              }
              if (!late) next_first(s, next);
            },
            [&](int s, int m, const float (&sum)[2][4]) {
              uint32_t operand[4];
              Block::to_operand(operand, sum);
              Block::add_last(out[m], operand, slast, s, lane);
            });
        if (late)
#pragma unroll
          for (int s = 0; s < steps; ++s) next_first(s, next);
        write(p, out, column.i0 + warp / share % WI, jb * WJ + warp / share / WI, column.k0 + Block::first_row(warp), lane.g,
              lane.t);
        if (in == 0) {  // h_1 of the next step belongs in h[0]
#pragma unroll
          for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int q = 0; q < steps; ++q)
#pragma unroll
              for (int r = 0; r < 4; ++r) h[0][m][q][r] = h[1][m][q][r];
        }
      }
    }
    ptx::wait_copies();  // a block without steps still has copies of weights in flight
  }

  // Writes the outputs of the warp's rows, from voxel k0 on. In out[m], a lane has rows g and g + 8: of output t or, with a single output, of that in every
  // lane; each as a high and a low part to be added.
  TCAM_DEVICE static void write(const FusedForward& p, const float (&out)[MT][4], int i, int j, int k0, int g, int t) {
    const FusedMaps& maps = p.maps;
    if (i >= maps.ni || j >= maps.nj) return;
    const int64_t row = (static_cast<int64_t>(i) * maps.nj + j) * maps.nk;
    // A single output: lane t writes row g + 8 t, so that a warp writes neighbours. Several: lane t writes output t at all
    // its rows.
    const bool one = p.n_out == 1;
    const int64_t to = (one ? 0 : t * p.channel_stride) + row + k0 + g;
#pragma unroll 1  // not unrolled: one copy of the code of output activations and store formats
    for (int q = one ? t : 0; q < (one && t + 1 < lines ? t + 1 : lines); ++q) {
      float x = 0.f;
#pragma unroll
      for (int r = 0; r < lines; ++r) x = q == r ? out[r >> 1][(r & 1) * 2] + out[r >> 1][(r & 1) * 2 + 1] : x;
      if (k0 + q * 8 + g < maps.nk && (one || t < p.n_out))
        Elements<float>::write(p.volume, p.dtype, to + q * 8, output_of<false>(p.output_activation, x));
    }
  }
};

// One block for each multiprocessor; each walks an equal range of the steps (FusedBlock::Steps).
template <class T, int N, int MT, int WI, int WJ, int products>
__global__ void __launch_bounds__(WI * WJ * 64 / MT, 1) fused_forward_kernel(FusedForward p) {
  FusedForwardKernel<T, N, MT, WI, WJ, products>::run(p);
}

// The instances of the kernel: padded width N, MT, and the WI x WJ tiles of a block. The first of a width that the device takes
// is chosen: MT = 1 needs wgmma, and the last one is for sm_80, where a block may have 163 KiB of shared memory.
#define TCAM_FUSED_FORWARD(X) X(64, 1, 6, 1) X(128, 1, 6, 1) X(64, 2, 12, 1) X(128, 2, 12, 1) X(128, 2, 3, 2)

struct FusedForwardKind {
  int width, mt, wi, wj;
  size_t bytes[fused_most_products + 1];  // shared memory of a block, by number of products
};
#define TCAM_KIND(N, MT, WI, WJ)                                                                                          \
  {N, MT, WI, WJ, {0, fused_shared_bytes<N, MT, WI, WJ, 1>(), fused_shared_bytes<N, MT, WI, WJ, 2>(), fused_shared_bytes<N, MT, WI, WJ, 3>()}},
constexpr FusedForwardKind fused_forward_kinds[] = {TCAM_FUSED_FORWARD(TCAM_KIND)};
#undef TCAM_KIND

// The instance for a width and a number of products on a device. Null: the device allows a block too little shared memory, and
// *needs is what the smallest instance takes.
inline const FusedForwardKind* choose_fused_forward(int width, int products, const Device& device, size_t* needs = nullptr) {
  for (const FusedForwardKind& kind : fused_forward_kinds) {
    if (kind.width != width || (kind.mt == 1 && !device.warpgroups)) continue;
    if (kind.bytes[products] <= static_cast<size_t>(device.shared_limit)) return &kind;
    if (needs) *needs = kind.bytes[products];
  }
  return nullptr;
}

template <class T, int N, int MT, int WI, int WJ, int products>
cudaError_t launch_fused_forward(const FusedForward& p, const Device& device, cudaStream_t stream) {
  constexpr size_t bytes = fused_shared_bytes<N, MT, WI, WJ, products>();
  auto kernel = fused_forward_kernel<T, N, MT, WI, WJ, products>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status != cudaSuccess) return status;
  return launch(kernel, dim3(static_cast<unsigned>(device.processors)), WI * WJ * 64 / MT, bytes, stream, p);
}

template <class T>
cudaError_t launch_fused_forward(const FusedForward& p, const FusedForwardKind& kind, int products, const Device& device,
                                 cudaStream_t stream) {
#define TCAM_LAUNCH(N, MT, WI, WJ)                                                          \
  if (kind.width == N && kind.mt == MT && kind.wi == WI && kind.wj == WJ) {                 \
    if (products == 1) return launch_fused_forward<T, N, MT, WI, WJ, 1>(p, device, stream); \
    if (products == 2) return launch_fused_forward<T, N, MT, WI, WJ, 2>(p, device, stream); \
    if (products == 3) return launch_fused_forward<T, N, MT, WI, WJ, 3>(p, device, stream); \
  }
  TCAM_FUSED_FORWARD(TCAM_LAUNCH)
#undef TCAM_LAUNCH
  return cudaErrorInvalidValue;
}

cudaError_t fused_forward_bfloat16(const FusedForward& p, const FusedForwardKind& kind, int products, const Device& device,
                                   cudaStream_t stream);
cudaError_t fused_forward_float16(const FusedForward& p, const FusedForwardKind& kind, int products, const Device& device,
                                  cudaStream_t stream);

}  // namespace tcam
