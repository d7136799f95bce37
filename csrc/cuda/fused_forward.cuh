// The fused forward kernel: all layers above the maps in one kernel on tensor cores. It takes ReLU decoders with hidden widths
// up to 128, up to 4 outputs, and one to three products between hidden layers, in bfloat16 or float16 with float32 sums.
//
//     h_1(i,j,k) = relu(A[i,j] + B[j,k] + G[i,k]);  h_l = relu(W_l h_(l-1) + b_l);  out = W_L h_(L-1) + b_L
//
// A block has one or more teams of warps (fused_tile.cuh). Shared memory has all weights and each team's tiles of the maps.
// With mma.sync, h_1 of the next step is computed during the last product of the current one, so that the tensor cores do not
// wait for it. With wgmma, the products of other teams fill such gaps, and more teams fit if each needs the registers of one h.
#pragma once
#include "fused_tile.cuh"

namespace tcam {

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

// The teams of a block. With wgmma, four of 128 threads use all registers of an SM.
constexpr int fused_forward_teams(int MT) { return MT == 1 ? 4 : 1; }

// Bytes of dynamic shared memory of a block.
template <int N, int MT, int WI, int WJ, int products>
constexpr size_t fused_shared_bytes() {
  return 2 * (products * N * N + fused_forward_teams(MT) * FusedTeam<float, N, MT, WI, WJ>::Stage::elements + 8 * N) +
         4 * products * N + 128;
}

template <class T, int N, int MT, int WI, int WJ, int products>
struct FusedForwardKernel {
  using Team = FusedTeam<T, N, MT, WI, WJ>;
  static constexpr int teams = fused_forward_teams(MT), threads = teams * Team::threads;
  static constexpr int steps = Team::steps, lines = Team::lines, share = Team::share;
  static constexpr bool two = MT == 2;  // whether a product's result goes to another h than its input

  // Loads the weights to shared memory; then each team walks its steps, column by column.
  TCAM_DEVICE static void run(const FusedForward& p) {
    Shared shared;
    uint16_t* sw = shared.take<uint16_t>(products * N * N);
    uint16_t* slast = shared.take<uint16_t>(8 * N);
    float* sbias = shared.take<float>(products * N + fused_most_out);
    const int tid = threadIdx.x, team = teams == 1 ? 0 : tid / Team::threads;
    uint16_t* const maps = shared.take<uint16_t>(teams * Team::Stage::elements);
    for (int l = 0; l < products; ++l)
      Team::stage_panel(sw + l * N * N, p.weights + static_cast<size_t>(l) * N * N, tid, threads);
    ptx::commit_copies();
    for (int c = tid; c < products * N; c += threads) sbias[c] = p.biases[c];
    Team::split_last(slast, p.last, p.n_out, tid, threads);
    if (tid < fused_most_out) {
      const int o = p.n_out == 1 ? 0 : tid;
      sbias[products * N + tid] = p.last_bias && o < p.n_out ? p.last_bias[o] : 0.f;
    }
    Team::wait_panels();
    __syncthreads();
    walk(p, sw, sbias, slast, typename Team::Stage(maps + team * Team::Stage::elements), team, tid % Team::threads);
  }

  TCAM_DEVICE static void walk(const FusedForward& p, const uint16_t* sw, const float* sbias, const uint16_t* slast,
                               const typename Team::Stage& stage, int team, int tid) {
    Lane<N> lane;
    const int warp = tid >> 5;
    constexpr int in = two ? (products - 1) & 1 : 0, next = two ? in ^ 1 : 0;
    typename Team::Fragment h[two ? 2 : 1];  // a step begins with h_1 in h[0]
    auto meet = [&] { ptx::barrier_wait(1 + team, Team::threads); };
    const typename Team::Steps all(p.maps, blockIdx.x * teams + team, gridDim.x * teams);
    for (int s = all.begin; s < all.end;) {
      const typename Team::Column column(all, s);
      const int j_first = column.j_first, j_last = column.j_last;
      s += j_last - j_first;
      Team::stage_column(stage, p.maps, column, tid);
      Team::stage_step(stage, p.maps, column, j_first, tid);
      // h_1 of a step whose maps have been staged; then those of step `following` are.
      auto first = [&](int following) {
        ptx::wait_copies();
        meet();
#pragma unroll
        for (int q = 0; q < steps; ++q) Team::first_layer(h[0], q, stage, warp, lane);
        meet();  // all warps have read the maps
        if (following < j_last) Team::stage_step(stage, p.maps, column, following, tid);
      };
      if (two) first(j_first + 1);
#pragma unroll 1
      for (int jb = j_first; jb < j_last; ++jb) {
        lane.forget();
        if (!two) first(jb + 1);
#pragma unroll
        for (int l = 0; l + 1 < products; ++l)
          Team::template multiply<1, true>(
              h[two ? l & 1 : 0], sw + l * N * N, sbias + l * N, lane, [](int) {},
              [&](int q, int m, const float (&sum)[2][4]) { Team::to_operand(h[two ? (l + 1) & 1 : 0][m][q], sum); });
        float out[MT][4];
        const float last_bias = sbias[products * N + lane.t];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          out[m][0] = out[m][2] = last_bias;
          out[m][1] = out[m][3] = 0.f;
        }
        Team::template multiply<1, true>(
            h[in], sw + (products - 1) * N * N, sbias + (products - 1) * N, lane,
            [&](int q) {
              if (!two) return;
              if (q == 0) {
                ptx::wait_copies();
                meet();  // the maps of step jb + 1 have arrived; after the last step of a column, stale ones are read
              }
              Team::first_layer(h[next], q, stage, warp, lane);
            },
            [&](int q, int m, const float (&sum)[2][4]) {
              uint32_t operand[4];
              Team::to_operand(operand, sum);
              Team::add_last(out[m], operand, slast, q, lane);
            });
        if (two) {
          meet();  // all warps have read the maps of step jb + 1
          if (jb + 2 < j_last) Team::stage_step(stage, p.maps, column, jb + 2, tid);
        }
        write(p, out, column.i0 + warp / share % WI, jb * WJ + warp / share / WI, column.k0 + Team::first_row(warp), lane.g,
              lane.t);
        if (next == 1) {
#pragma unroll
          for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int q = 0; q < steps; ++q)
#pragma unroll
              for (int r = 0; r < 4; ++r) h[0][m][q][r] = h[next][m][q][r];
        }
      }
    }
  }

  // Writes the outputs of the warp's rows, from voxel k0 on. In out[m], a lane has rows g and g + 8: of output t or, with a
  // single output, of that in every lane; each as a high and a low part to be added.
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

// One block for each multiprocessor; each team walks an equal range of the steps (FusedTeam::Steps).
template <class T, int N, int MT, int WI, int WJ, int products>
__global__ void __launch_bounds__(FusedForwardKernel<T, N, MT, WI, WJ, products>::threads, 1)
    fused_forward_kernel(FusedForward p) {
  FusedForwardKernel<T, N, MT, WI, WJ, products>::run(p);
}

// The instances of the kernel: padded width N, MT, and the WI x WJ tiles of a team. The first of a width that the device takes
// is chosen: MT = 1 needs wgmma, and the last one is for sm_80, where a block may have 163 KiB of shared memory.
#define TCAM_FUSED_FORWARD(X) X(64, 1, 2, 1) X(128, 1, 2, 1) X(64, 2, 12, 1) X(128, 2, 12, 1) X(128, 2, 3, 2)

struct FusedForwardKind {
  int width, mt, wi, wj;
  size_t bytes[fused_most_products + 1];  // shared memory of a block, by number of products
};
#define TCAM_KIND(N, MT, WI, WJ)                                                       \
  {N,                                                                                  \
   MT,                                                                                 \
   WI,                                                                                 \
   WJ,                                                                                 \
   {0, fused_shared_bytes<N, MT, WI, WJ, 1>(), fused_shared_bytes<N, MT, WI, WJ, 2>(), \
    fused_shared_bytes<N, MT, WI, WJ, 3>()}},
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
  return launch(kernel, dim3(static_cast<unsigned>(device.processors)), FusedForwardKernel<T, N, MT, WI, WJ, products>::threads,
                bytes, stream, p);
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
