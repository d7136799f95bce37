// decode_grid's forward on tensor cores, all hidden layers in one kernel: relu, hidden widths to 128, C_out to 4, one to three
// products between hidden layers, in bfloat16 or float16 with float32 sums.
//
//     h_1(i,j,k) = relu(A[i,j] + B[j,k] + G[i,k]);  h_l = relu(W_l h_(l-1) + b_l);  out = W_L h_(L-1) + b_L
//
// A block has WI x WJ warps, each a tile of fused_tile.cuh. i is fixed for a warp over a whole column (a tile of k, a group of
// i), j runs. Shared memory holds all weights, the column's G tiles, and B and A in a ring of two. The h_1 of step s+1 is built
// during the last product of step s, so the tensor cores do not wait for it.
#pragma once
#include "fused_tile.cuh"

namespace tcam {

constexpr int fused_most_products = 3;

struct FusedForward {
  FusedMaps maps;
  const uint16_t* weights;  // (products, N, N), row: output
  const float* biases;      // (products, N)
  const float* last;        // (n_out, N)
  const float* last_bias;   // (n_out) or null
  int n_out;
  Final<float> output_activation;
  void* volume;  // the first voxel of one object, (C_out, ...)
  int dtype;
  int64_t channel_stride;
};

template <int N, int MT, int WI, int WJ, int products>
constexpr size_t fused_shared_bytes() {
  return 2 * (products * N * N + FusedBlock<float, N, MT, WI, WJ>::Stage::elements + 8 * N) + 4 * products * N + 128;
}

template <class T, int N, int MT, int WI, int WJ, int products>
struct FusedForwardKernel {
  using Block = FusedBlock<T, N, MT, WI, WJ>;
  static constexpr int warps = Block::warps, threads = Block::threads, steps = Block::steps;

  TCAM_DEVICE static void run(const FusedForward& p) {
    Shared shared;
    uint16_t* sw = shared.take<uint16_t>(products * N * N);
    const typename Block::Stage stage(shared);
    uint16_t* slast = shared.take<uint16_t>(8 * N);
    float* sbias = shared.take<float>(products * N + fused_most_out);
    const Lane<N> lane;
    const int tid = threadIdx.x, warp = tid >> 5;

    Block::stage_rows(sw, p.weights, products * N, tid, threads);
    ptx::commit_copies();
    for (int c = tid; c < products * N; c += threads) sbias[c] = p.biases[c];
    Block::split_last(slast, p.last, p.n_out, tid, threads);
    if (tid < fused_most_out) {
      const int o = p.n_out == 1 ? 0 : tid;
      sbias[products * N + tid] = p.last_bias && o < p.n_out ? p.last_bias[o] : 0.f;
    }

    const uint16_t* g_tile = stage.g_tile(warp);
    typename Block::Fragment h[2];
    const typename Block::Steps all(p.maps, blockIdx.x, gridDim.x);
    for (int s = all.begin; s < all.end;) {
      const typename Block::Column column(all, s);
      const int j_first = column.j_first, j_last = column.j_last;
      s += j_last - j_first;
      __syncthreads();  // all have left the column before
      Block::stage_column(stage, p.maps, column, tid);
      Block::stage_step(stage, p.maps, column, j_first, 0, tid);
      ptx::wait_copies();
      __syncthreads();
      if (j_last - j_first > 1) Block::stage_step(stage, p.maps, column, j_first + 1, 1, tid);
#pragma unroll
      for (int q = 0; q < steps; ++q) Block::first_layer(h[0], q, stage.a_row(warp, 0), stage.b_tile(warp, 0), g_tile, lane);
#pragma unroll 1
      for (int jb = j_first; jb < j_last; ++jb) {
        const int next = (jb - j_first + 1) & 1;
#pragma unroll
        for (int l = 0; l + 1 < products; ++l)
#pragma unroll
          for (int nb = 0; nb < steps; ++nb) {
            float sum[1][MT][2][4];
            Block::product(sum, h[l & 1], sw + l * N * N, sbias + l * N, nb, lane);
#pragma unroll
            for (int m = 0; m < MT; ++m) Block::to_operand(h[(l + 1) & 1][m][nb], sum[0][m]);
          }
        constexpr int in = (products - 1) & 1;
        ptx::wait_copies();
        __syncthreads();  // step jb + 1 has landed, and all have read step jb
        if (jb + 2 < j_last) Block::stage_step(stage, p.maps, column, jb + 2, next ^ 1, tid);
        float out[MT][4];
        const float last_bias = sbias[products * N + lane.t];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          out[m][0] = out[m][2] = last_bias;
          out[m][1] = out[m][3] = 0.f;
        }
#pragma unroll
        for (int nb = 0; nb < steps; ++nb) {
          float sum[1][MT][2][4];
          Block::product(sum, h[in], sw + (products - 1) * N * N, sbias + (products - 1) * N, nb, lane);
          // At the last step: old bytes, not used.
          Block::first_layer(h[in ^ 1], nb, stage.a_row(warp, next), stage.b_tile(warp, next), g_tile, lane);
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            uint32_t operand[4];
            Block::to_operand(operand, sum[0][m]);
            Block::add_last(out[m], operand, slast, nb, lane);
          }
        }
        write(p, out, column.i0 + warp % WI, jb * WJ + warp / WI, column.k0, lane.g, lane.t);
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
    ptx::wait_copies();  // a block without work has its weights under way
  }

  // Rows g and g + 8 of each m; lane t of a quad holds output t, or the one output as all lanes do.
  TCAM_DEVICE static void write(const FusedForward& p, const float (&out)[MT][4], int i, int j, int k0, int g, int t) {
    const FusedMaps& maps = p.maps;
    if (i >= maps.ni || j >= maps.nj) return;
    const int64_t row = (static_cast<int64_t>(i) * maps.nj + j) * maps.nk;
    // One output: lane t writes row g + 8 t, so that a warp writes 32 neighbours. More: lane t writes all four rows of output
    // t.
    const bool one = p.n_out == 1;
    const int64_t to = (one ? 0 : t * p.channel_stride) + row + k0 + g;
#pragma unroll 1  // one copy of the output activation and of the store's formats
    for (int q = one ? t : 0; q < (one ? t + 1 : 4); ++q) {
      float x = 0.f;
#pragma unroll
      for (int r = 0; r < 4; ++r) x = q == r ? out[r >> 1][(r & 1) * 2] + out[r >> 1][(r & 1) * 2 + 1] : x;
      if (k0 + q * 8 + g < maps.nk && (one || t < p.n_out))
        Elements<float>::write(p.volume, p.dtype, to + q * 8, output_of<false>(p.output_activation, x));
    }
  }
};

template <class T, int N, int MT, int WI, int WJ, int products>
__global__ void __launch_bounds__(WI * WJ * 32, 1) fused_forward_kernel(FusedForward p) {
  FusedForwardKernel<T, N, MT, WI, WJ, products>::run(p);
}

// The kernels by padded width and warps, WI x WJ, of a block; of those of a width the first that fits is taken. The last is
// for the 163 KiB of shared memory that a block of sm_80 may have.
#define TCAM_FUSED_FORWARD(X) X(64, 12, 1) X(128, 12, 1) X(128, 3, 2)

struct FusedForwardKind {
  int width, wi, wj;
  size_t bytes[fused_most_products + 1];  // of shared memory, by products
};
#define TCAM_KIND(N, WI, WJ) \
  {N,                        \
   WI,                       \
   WJ,                       \
   {0, fused_shared_bytes<N, 2, WI, WJ, 1>(), fused_shared_bytes<N, 2, WI, WJ, 2>(), fused_shared_bytes<N, 2, WI, WJ, 3>()}},
constexpr FusedForwardKind fused_forward_kinds[] = {TCAM_FUSED_FORWARD(TCAM_KIND)};
#undef TCAM_KIND

// By the sizes alone. Null: a block of the device has too little shared memory, and `needs` says how much the smallest takes.
inline const FusedForwardKind* choose_fused_forward(int width, int products, const Device& device, size_t* needs = nullptr) {
  for (const FusedForwardKind& kind : fused_forward_kinds) {
    if (kind.width != width) continue;
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
  return launch(kernel, dim3(static_cast<unsigned>(device.processors)), WI * WJ * 32, bytes, stream, p);
}

template <class T>
cudaError_t launch_fused_forward(const FusedForward& p, const FusedForwardKind& kind, int products, const Device& device,
                                 cudaStream_t stream) {
#define TCAM_LAUNCH(N, WI, WJ)                                                             \
  if (kind.width == N && kind.wi == WI && kind.wj == WJ) {                                 \
    if (products == 1) return launch_fused_forward<T, N, 2, WI, WJ, 1>(p, device, stream); \
    if (products == 2) return launch_fused_forward<T, N, 2, WI, WJ, 2>(p, device, stream); \
    if (products == 3) return launch_fused_forward<T, N, 2, WI, WJ, 3>(p, device, stream); \
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
