// What becomes of the backward kernel's results: delta_1 summed into the gradients of the maps, and the blocks' sums of the top
// layers made gradients.
#pragma once
#include "fused_backward.cuh"
#include "planes.cuh"

namespace tcam {

constexpr int sum_tile = 16;  // voxels of j and of k that a block of delta_sums_kernel owns

// ---- from delta_1 to the maps -----------------------------------------------------------------

// Of a slab: db[j, k] += sum over i of delta_1; partial_a[i, j, tile of k] and partial_g[i, tile of j, k]: the sums over the
// tile. A block owns a tile of (j, k) and walks i. A thread has 8 channels, and half of the tile's j at one k; then half of its
// k at one j. The halves meet in shared memory. Loads are not guarded, so that eight of them are on their way at once.
template <class T, int N>
__global__ void __launch_bounds__(sum_tile* N / 4)
    delta_sums_kernel(const uint16_t* __restrict__ delta1, int ni, int nj, int nk, int n, const float* factor,
                      float* __restrict__ db, float* __restrict__ partial_a, float* __restrict__ partial_g) {
  constexpr int lanes = N / 8, own = sum_tile / 2;
  Shared shared;
  float* other = shared.take<float>(2 * 2 * sum_tile * N);  // of the upper halves: twice, (for g, for a), line, channel
  const int at = threadIdx.x % lanes * 8, line = threadIdx.x / lanes % sum_tile, upper = threadIdx.x / (lanes * sum_tile);
  const int tk = blockIdx.x, tj = blockIdx.y, tiles_k = gridDim.x, tiles_j = gridDim.y;
  const int j0 = tj * sum_tile, k0 = tk * sum_tile;
  const float f = factor ? *factor : 1.f;
  float sum_b[own][8] = {};
  // use(q, delta_1) at `own` voxels, (dj, dk) apart; zero beyond the volume.
  auto each = [&](int i, int j, int k, int dj, int dk, auto use) {
    uint4 raw[own];
#pragma unroll
    for (int q = 0; q < own; ++q) {
      const int jq = j + q * dj, kq = k + q * dk;
      const size_t voxel = (static_cast<size_t>(i) * nj + (jq < nj ? jq : nj - 1)) * nk + (kq < nk ? kq : nk - 1);
      raw[q] = *reinterpret_cast<const uint4*>(delta1 + voxel * N + at);
    }
#pragma unroll
    for (int q = 0; q < own; ++q) {
      const bool inside = j + q * dj < nj && k + q * dk < nk;
      const uint32_t all[4] = {raw[q].x, raw[q].y, raw[q].z, raw[q].w};
      float v[8];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        v[2 * c] = inside ? T::widen(static_cast<uint16_t>(all[c])) : 0.f;
        v[2 * c + 1] = inside ? T::widen(static_cast<uint16_t>(all[c] >> 16)) : 0.f;
      }
      use(q, v);
    }
  };
  for (int i = 0; i < ni; ++i) {
    float sum_g[8] = {}, sum_a[8] = {};
    each(i, j0 + upper * own, k0 + line, 1, 0, [&](int q, const float (&v)[8]) {
#pragma unroll
      for (int c = 0; c < 8; ++c) sum_b[q][c] += v[c], sum_g[c] += v[c];
    });
    each(i, j0 + line, k0 + upper * own, 0, 1, [&](int, const float (&v)[8]) {
#pragma unroll
      for (int c = 0; c < 8; ++c) sum_a[c] += v[c];
    });
    float* const g_other = other + ((i & 1) * 2 * sum_tile + line) * N + at;
    float* const a_other = g_other + sum_tile * N;
    if (upper)
#pragma unroll
      for (int c = 0; c < 8; ++c) g_other[c] = sum_g[c], a_other[c] = sum_a[c];
    __syncthreads();  // and the halves of step i - 1 have been read
    if (upper) continue;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const int channel = delta1_column(at + c);
      if (channel < n && k0 + line < nk)
        partial_g[((static_cast<size_t>(i) * tiles_j + tj) * nk + k0 + line) * n + channel] = (sum_g[c] + g_other[c]) * f;
      if (channel < n && j0 + line < nj)
        partial_a[((static_cast<size_t>(i) * nj + j0 + line) * tiles_k + tk) * n + channel] = (sum_a[c] + a_other[c]) * f;
    }
  }
#pragma unroll
  for (int q = 0; q < own; ++q) {
    const int j = j0 + upper * own + q;
    if (j >= nj || k0 + line >= nk) continue;
    float* const to = db + (static_cast<size_t>(j) * nk + k0 + line) * n;
    float before[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) before[c] = to[delta1_column(at + c) < n ? delta1_column(at + c) : 0];
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (delta1_column(at + c) < n) to[delta1_column(at + c)] = before[c] + sum_b[q][c] * f;
  }
}

// ---- the gradients of the layers at the top -------------------------------------------------------

struct TopLayers {
  Partials<float> sums, row_sums;  // of dW_(P+1) and db_(P+1) without the factor w of the row
  const uint16_t* weight;          // W_(P+1) as the kernel multiplied it, rows `pitch` apart
  const float *bias, *last;        // b_(P+1); w, the last layer's weights, of its one output
  int pitch, columns;
  const float* factor;
  float *grad_weight, *grad_bias, *grad_last;
};

// dW_r = w_r S_r, db_r = w_r s_r and, because h_r = mask_r (W_r h + b_r), dw_r = sum of dy h_r = W_r . S_r + b_r s_r: the
// voxels of the last layer need not be walked again. A block takes a row.
template <class T>
__global__ void __launch_bounds__(threads) combine_top_kernel(TopLayers p) {
  Shared shared;
  float* all = shared.take<float>(threads);
  const int r = blockIdx.x;
  const float f = p.factor ? *p.factor : 1.f, w = p.last[r];
  float dot = 0.f;
  for (int c = threadIdx.x; c < p.columns; c += threads) {
    float sum = 0.f;
    for (int64_t s = 0; s < p.sums.splits; ++s) sum += p.sums.data[s * p.sums.split_pitch + r * p.sums.row_pitch + c];
    p.grad_weight[static_cast<int64_t>(r) * p.columns + c] = sum * w * f;
    dot += sum * T::widen(p.weight[r * p.pitch + c]);
  }
  dot = reduce_block(dot, all, [](float a, float b) { return a + b; });
  if (threadIdx.x) return;
  float sum = 0.f;
  for (int64_t s = 0; s < p.row_sums.splits; ++s) sum += p.row_sums.data[s * p.row_sums.split_pitch + r];
  if (p.grad_bias) p.grad_bias[r] = sum * w * f;
  p.grad_last[r] = (dot + sum * p.bias[r]) * f;
}

static __global__ void write_scalar_kernel(const double* value, const float* factor, float* out) {
  *out = static_cast<float>(*value * (factor ? static_cast<double>(*factor) : 1.));
}

}  // namespace tcam
