// decode_grid's forward on tensor cores, all hidden layers in one kernel: relu, hidden widths to 128, C_out to 4, one to three
// products between hidden layers, in bfloat16 or float16 with float32 sums.
//
//     h_1(i,j,k) = relu(A[i,j] + B[j,k] + G[i,k]);  h_l = relu(W_l h_(l-1) + b_l);  out = W_L h_(L-1) + b_L
//
// A block has WI x WJ warps; a warp takes R = 16 MT neighbours along k at one (i,j) as the rows of m16n8k16 products, and keeps
// their activations in registers from layer to layer: the accumulators of a product are, rounded, the A operand of the next. i
// is fixed for a warp over a whole column (a tile of k, a group of i), j runs. Shared memory holds all weights, the column's G
// tiles, and B and A in a ring of two. Rows of N numbers; the 16-byte chunk c of row r stands at c ^ (r & 7), so that ldmatrix
// meets no bank twice. The h_1 of step s+1 is built during the last product of step s, so the tensor cores do not wait for it.
// The last layer is one more product: its weight as high + low halves in neighbouring columns, which loses nothing of float32's
// accuracy.
#pragma once
#include "../maths/activation.h"
#include "ptx.h"

namespace tcam {

constexpr int fused_most_out = 4, fused_most_products = 3;

struct FusedForward {
  const uint16_t *a, *b, *g;  // (ni, nj, N), (nj, nk, N), (ni, nk, N)
  const uint16_t* weights;    // (products, N, N), row: output
  const float* biases;        // (products, N)
  const float* last;          // (n_out, N)
  const float* last_bias;     // (n_out) or null
  int n_out;
  OutputActivation output_activation;
  void* volume;  // the slab's first voxel of one object, (C_out, ...)
  int dtype;
  int64_t channel_stride;
  int ni, nj, nk;
};

template <int N, int MT, int WI, int WJ, int products>
constexpr size_t fused_shared_bytes() {
  return 2 * (products * N * N + WI * 16 * MT * N + 2 * WJ * 16 * MT * N + 2 * WI * WJ * N + 8 * N) + 4 * products * N + 128;
}

template <class T, int N, int MT, int WI, int WJ, int products>
struct FusedForwardKernel {
  static constexpr int R = 16 * MT, warps = WI * WJ, threads = warps * 32, tile = R * N, steps = N / 16, chunks = N / 8;
  static_assert(MT == 2 && steps % 2 == 0 && chunks >= 8, "");
  using Fragment = uint32_t[MT][steps][4];

  TCAM_DEVICE static int at(int row, int chunk) { return row * N + ((chunk ^ (row & 7)) << 3); }

  TCAM_DEVICE static void run(const FusedForward& p) {
    Shared shared;
    uint16_t* sw = shared.take<uint16_t>(products * N * N);
    uint16_t* sg = shared.take<uint16_t>(WI * tile);
    uint16_t* sb = shared.take<uint16_t>(2 * WJ * tile);
    uint16_t* sa = shared.take<uint16_t>(2 * warps * N);
    uint16_t* slast = shared.take<uint16_t>(8 * N);
    float* sbias = shared.take<float>(products * N + fused_most_out);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, wi = warp % WI, wj = warp / WI, g = lane >> 2, t = lane & 3;

    for (int c = tid; c < products * N * chunks; c += threads)
      ptx::copy16(sw + c / (N * chunks) * N * N + at(c / chunks % N, c % chunks), p.weights + static_cast<size_t>(c) * 8);
    ptx::commit_copies();
    for (int c = tid; c < products * N; c += threads) sbias[c] = p.biases[c];
    for (int c = tid; c < N; c += threads)
      for (int n = 0; n < 8; ++n) {  // columns 2o and 2o+1: the halves of output o; one output stands in all of them
        const int o = p.n_out == 1 ? 0 : n / 2;
        const float w = o < p.n_out ? p.last[o * N + c] : 0.f;
        const uint16_t high = T::round(w);
        slast[at(n, c >> 3) + (c & 7)] = n & 1 ? T::round(w - T::widen(high)) : high;
      }
    if (tid < fused_most_out) {
      const int o = p.n_out == 1 ? 0 : tid;
      sbias[products * N + tid] = p.last_bias && o < p.n_out ? p.last_bias[o] : 0.f;
    }

    const int tiles_k = (p.nk + R - 1) / R, tiles_i = (p.ni + WI - 1) / WI, tiles_j = (p.nj + WJ - 1) / WJ;
    const int total = tiles_k * tiles_i * tiles_j;  // below 2^31: choose_fused_width
    const int begin = static_cast<int>(static_cast<int64_t>(total) * blockIdx.x / gridDim.x);
    const int end = static_cast<int>(static_cast<int64_t>(total) * (blockIdx.x + 1) / gridDim.x);

    // A lane's element in the first k-step of a tile; in step s it is that ^ 16 s, because the swizzle is an exclusive or.
    // Activations: row lane & 15, chunk parity lane >> 4; weights as ldmatrix wants them.
    const int swizzle = lane & 7;
    const int lane_a = (lane & 15) * N + (((lane >> 4) ^ swizzle) << 3);
    const int lane_w = ((lane & 7) + ((lane >> 4) << 3)) * N + ((((lane >> 3) & 1) ^ swizzle) << 3);
    const uint16_t* g_tile = sg + wi * tile;

    Fragment h[2];
    // k-step s of h_1. A's row is the same for all rows of the fragment: every lane reads it by broadcast.
    auto first_layer = [&](Fragment& out, int s, int buffer) {
      uint32_t a[4];
      ptx::load_matrices(a, sa + (buffer * warps + warp) * N + ((s & ~1) * 2 + (lane >> 3)) * 8);
      const uint16_t* b_tile = sb + (buffer * WJ + wj) * tile;
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        uint32_t bv[4], gv[4];
        const int offset = m * 16 * N + (lane_a ^ (s << 4));
        ptx::load_matrices(bv, b_tile + offset);
        ptx::load_matrices(gv, g_tile + offset);
#pragma unroll
        for (int r = 0; r < 4; ++r) out[m][s][r] = T::add_relu(T::add(a[(s & 1) * 2 + (r >> 1)], gv[r]), bv[r]);
      }
    };
    // 16 outputs from 16 nb on, of product l, over all of the contraction.
    auto product = [&](float (&sum)[MT][2][4], const Fragment& in, int l, int nb) {
      float bias[2][4];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        ptx::load_pair(bias[e], sbias + l * N + nb * 16 + e * 8 + t * 2);
        bias[e][2] = bias[e][0];
        bias[e][3] = bias[e][1];
      }
#pragma unroll
      for (int s = 0; s < steps; ++s) {
        uint32_t w[4];
        ptx::load_matrices(w, sw + (l * N + nb * 16) * N + (lane_w ^ (s << 4)));
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int e = 0; e < 2; ++e) T::mma(sum[m][e], in[m][s], w + 2 * e, s ? sum[m][e] : bias[e]);
      }
    };
    auto to_operand = [](uint32_t (&out)[4], const float (&c)[2][4]) {
      out[0] = T::pack_relu(c[0][0], c[0][1]);
      out[1] = T::pack_relu(c[0][2], c[0][3]);
      out[2] = T::pack_relu(c[1][0], c[1][1]);
      out[3] = T::pack_relu(c[1][2], c[1][3]);
    };

    for (int s = begin; s < end;) {
      const int column = s / tiles_j, j_first = s % tiles_j;
      const int j_last = end - s < tiles_j - j_first ? j_first + (end - s) : tiles_j;
      const int k0 = column % tiles_k * R, i0 = column / tiles_k * WI;
      s += j_last - j_first;
      auto clamped = [](int x, int n) {
        return x < n ? x : n - 1;
      };  // rows past the end repeat the last: computed, never written
      auto stage = [&](int jb, int buffer) {
#pragma unroll
        for (int u = 0; u < (WJ * R * chunks + threads - 1) / threads; ++u) {
          const int c = tid + u * threads, r = c / chunks;
          if (WJ * R * chunks % threads == 0 || c < WJ * R * chunks)
            ptx::copy16(sb + buffer * WJ * tile + at(r, c % chunks),
                        p.b + (static_cast<size_t>(clamped(jb * WJ + r / R, p.nj)) * p.nk + clamped(k0 + r % R, p.nk)) * N +
                            c % chunks * 8);
        }
        if (tid < warps * chunks) {
          const int w = tid / chunks;
          ptx::copy16(sa + (buffer * warps + w) * N + tid % chunks * 8,
                      p.a + (static_cast<size_t>(clamped(i0 + w % WI, p.ni)) * p.nj + clamped(jb * WJ + w / WI, p.nj)) * N +
                          tid % chunks * 8);
        }
        ptx::commit_copies();
      };
      __syncthreads();  // all have left the column before
#pragma unroll 1
      for (int c = tid; c < WI * R * chunks; c += threads) {
        const int r = c / chunks;
        ptx::copy16(
            sg + at(r, c % chunks),
            p.g + (static_cast<size_t>(clamped(i0 + r / R, p.ni)) * p.nk + clamped(k0 + r % R, p.nk)) * N + c % chunks * 8);
      }
      stage(j_first, 0);
      ptx::wait_copies();
      __syncthreads();
      if (j_last - j_first > 1) stage(j_first + 1, 1);
#pragma unroll
      for (int q = 0; q < steps; ++q) first_layer(h[0], q, 0);
#pragma unroll 1
      for (int jb = j_first; jb < j_last; ++jb) {
        const int next = (jb - j_first + 1) & 1;
#pragma unroll
        for (int l = 0; l + 1 < products; ++l)
#pragma unroll
          for (int nb = 0; nb < steps; ++nb) {
            float sum[MT][2][4];
            product(sum, h[l & 1], l, nb);
#pragma unroll
            for (int m = 0; m < MT; ++m) to_operand(h[(l + 1) & 1][m][nb], sum[m]);
          }
        constexpr int in = (products - 1) & 1;
        ptx::wait_copies();
        __syncthreads();  // step jb + 1 has landed, and all have read step jb
        if (jb + 2 < j_last) stage(jb + 2, next ^ 1);
        float out[MT][4];
        const float last_bias = sbias[products * N + t];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          out[m][0] = out[m][2] = last_bias;
          out[m][1] = out[m][3] = 0.f;
        }
#pragma unroll
        for (int nb = 0; nb < steps; ++nb) {
          float sum[MT][2][4];
          product(sum, h[in], products - 1, nb);
          first_layer(h[in ^ 1], nb, next);  // at the last step: old bytes, not used
          uint32_t w[4];                     // of two steps; the compiler keeps one load for both
          ptx::load_matrices(w, slast + swizzle * N + (((nb / 2 * 4 + (lane >> 3)) ^ swizzle) << 3));
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            uint32_t operand[4];
            to_operand(operand, sum[m]);
            T::mma(out[m], operand, w + 2 * (nb & 1), out[m]);
          }
        }
        write(p, out, i0 + wi, jb * WJ + wj, k0, g, t);
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
    using M = Maths<Scalar<float>>;
    if (i >= p.ni || j >= p.nj) return;
    const int64_t row = (static_cast<int64_t>(i) * p.nj + j) * p.nk;
    // One output: lane t writes row g + 8 t, so that a warp writes 32 neighbours. More: lane t writes all four rows of output
    // t.
    const bool one = p.n_out == 1;
    const int64_t to = (one ? 0 : t * p.channel_stride) + row + k0 + g;
#pragma unroll 1  // one copy of the output activation and of the store's formats
    for (int q = one ? t : 0; q < (one ? t + 1 : 4); ++q) {
      float x = 0.f;
#pragma unroll
      for (int r = 0; r < 4; ++r) x = q == r ? out[r >> 1][(r & 1) * 2] + out[r >> 1][(r & 1) * 2 + 1] : x;
      if (k0 + q * 8 + g < p.nk && (one || t < p.n_out))
        Elements<float>::write(p.volume, p.dtype, to + q * 8, M::output(p.output_activation, x));
    }
  }
};

template <class T, int N, int MT, int WI, int WJ, int products>
__global__ void __launch_bounds__(WI * WJ * 32, 1) fused_forward_kernel(FusedForward p) {
  FusedForwardKernel<T, N, MT, WI, WJ, products>::run(p);
}

// A device as the launchers see it.
struct Device {
  int shared_limit;  // bytes that a block may have
  int processors;
};

template <class T, int N, int MT, int WI, int WJ, int products>
cudaError_t launch_fused_forward(const FusedForward& p, const Device& device, cudaStream_t stream) {
  constexpr size_t bytes = fused_shared_bytes<N, MT, WI, WJ, products>();
  if (static_cast<size_t>(device.shared_limit) < bytes) return cudaErrorInvalidConfiguration;
  auto kernel = fused_forward_kernel<T, N, MT, WI, WJ, products>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status != cudaSuccess) return status;
  return launch(kernel, dim3(static_cast<unsigned>(device.processors)), WI * WJ * 32, bytes, stream, p);
}

// cudaErrorInvalidConfiguration where no kernel fits: the caller then takes another road.
template <class T>
cudaError_t choose_fused_forward(const FusedForward& p, int width, int products, const Device& device, cudaStream_t stream) {
#define TCAM_FUSED(N, WI, WJ)                                                                \
  do {                                                                                       \
    cudaError_t status = cudaErrorInvalidConfiguration;                                      \
    if (products == 1) status = launch_fused_forward<T, N, 2, WI, WJ, 1>(p, device, stream); \
    if (products == 2) status = launch_fused_forward<T, N, 2, WI, WJ, 2>(p, device, stream); \
    if (products == 3) status = launch_fused_forward<T, N, 2, WI, WJ, 3>(p, device, stream); \
    if (status != cudaErrorInvalidConfiguration) return status;                              \
  } while (0)
  if (width <= 64) {
    TCAM_FUSED(64, 12, 1);
  } else if (width <= 128) {
    TCAM_FUSED(128, 12, 1);
    TCAM_FUSED(128, 3, 2);  // for the 163 KiB of sm_80
  }
#undef TCAM_FUSED
  return cudaErrorInvalidConfiguration;
}

cudaError_t fused_forward_bfloat16(const FusedForward& p, int width, int products, const Device& device, cudaStream_t stream);
cudaError_t fused_forward_float16(const FusedForward& p, int width, int products, const Device& device, cudaStream_t stream);

}  // namespace tcam
