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
#include "../maths/half.h"
#include "../maths/loss.h"
#include "fused_tile.cuh"

namespace tcam {

constexpr int fused_most_blocks = 256;  // one a processor; bounds the partial sums
constexpr int fused_backward_wide = 4;  // chain warps, neighbours along i

struct FusedBackward {
  FusedMaps maps;
  const uint16_t* weights;  // (products, N, N): W_2 to W_(P+1)
  const uint16_t* top;      // (N, N): what delta_(P+1) is multiplied with
  const float* biases;      // (products, N)
  const float* last;        // (n_out, N): W_L
  const float* last_bias;   // (n_out)
  int products, n_out;
  int layer;                // whose weights: P+1 or L first, then down to 2
  bool head, weighted;      // weighted: the gradient of the weights is wanted
  const float* last_scale;  // that W_L, and with it every delta below, is multiplied with; null: 1. (In `top` it is already.)
  // Of the head:
  const void* volume;  // the first voxel: of the target, or of the gradient of the volume
  int dtype;
  int64_t channel_stride, voxel_stride;
  Final<float> output_activation;
  bool compares;
  Loss loss;
  double beta;
  const float* scale;  // that dl/dy is multiplied with; null: 1
  double* losses;      // (blocks, chain threads)
  double* dy_sums;     // the same: of dl/dy, with one output
  // From launch to launch:
  uint4* masks;      // (products, steps, chain threads): of h_2 to h_(P+1); null: for the losses alone
  float* dy;         // (steps, chain warps, n_out, R); null with masks
  uint16_t* delta1;  // (ni, nj, nk, N), channels in the order of delta1_column
  float* sums;       // (blocks, N, N): += dW_layer
  float* row_sums;   // (blocks, 2, N): += the sum of delta_layer, in two parts
};

template <class T, int N>
struct FusedBackwardKernel {
  static constexpr int MT = 2, WI = fused_backward_wide, WJ = 1, chain_warps = WI * WJ, outer_warps = 4;
  using Block = FusedBlock<T, N, MT, WI, WJ>;
  using Fragment = typename Block::Fragment;
  static constexpr int chain_threads = Block::threads, threads = chain_threads + 32 * outer_warps;
  static constexpr int steps = Block::steps, tile = Block::tile, R = Block::R, words = N / 32;
  static constexpr int pair_threads = 32 + 32 * outer_warps;  // at the barriers of a chain warp with the outer warps
  // Named barriers: of the chain warps; a chain warp's tile is written; it has been read.
  static constexpr int chain_barrier = 1, written = 2, read = written + chain_warps;

  // Products of the forward walk: to h_(P+1) in the head, else to h_(layer-1).
  TCAM_HD static int forward_products(const FusedBackward& p) { return p.head ? p.products : p.layer - 2; }
  // Of the walk back: to delta_layer, or to delta_1 in the launch of layer 2.
  TCAM_HD static int back_products(const FusedBackward& p) {
    return p.layer > p.products + 1 ? 0 : p.products + 1 - p.layer + (p.layer == 2 ? 1 : 0);
  }

  static size_t shared_bytes(const FusedBackward& p) {
    const size_t panels = static_cast<size_t>(forward_products(p) + back_products(p)) * N * N;
    return 2 * (panels + Block::Stage::elements + chain_warps * 2 * tile + 8 * N) +
           4 * (p.products * N + fused_most_out * N + fused_most_out) + 256;
  }

  struct Memory {
    uint16_t* panels;  // those of the forward walk, then those of the walk back
    typename Block::Stage stage;
    uint16_t* tiles;  // (chain warps, h and delta, R, N)
    uint16_t* split_last;
    float *biases, *last, *last_bias;
    TCAM_DEVICE Memory(Shared& shared, const FusedBackward& p)
        : panels(shared.take<uint16_t>((forward_products(p) + back_products(p)) * N * N)),
          stage(shared),
          tiles(shared.take<uint16_t>(chain_warps * 2 * tile)),
          split_last(shared.take<uint16_t>(8 * N)),
          biases(shared.take<float>(p.products * N)),
          last(shared.take<float>(fused_most_out * N)),
          last_bias(shared.take<float>(fused_most_out)) {}
  };

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
      chain(p, memory, all);
    else if (p.weighted)
      outer(p, memory, all);
  }

  // ---- the chain warps ----------------------------------------------------------------------

  // Where the halves of a fragment are positive (they are never negative): word (m * steps + s) / 4, bits (s % 4) * 4 + r and
  // 16 more.
  TCAM_DEVICE static void to_mask(uint32_t (&mask)[words], const Fragment& h) {
#pragma unroll
    for (int q = 0; q < words; ++q) mask[q] = 0;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          uint32_t& word = mask[(m * steps + s) / 4];
          word = word >> 1 | ((h[m][s][r] + 0x7fff7fffu) & 0x80008000u);
        }
  }
  TCAM_DEVICE static uint32_t masked(uint32_t value, const uint32_t (&mask)[words], int m, int s, int r) {
    return value & ptx::spread_signs(mask[(m * steps + s) / 4] << (15 - (s % 4 * 4 + r)));
  }

  TCAM_DEVICE static void load_mask(uint32_t (&mask)[words], const FusedBackward& p, int layer, int steps_in_all, int s,
                                    int tid) {
    const uint4 v = p.masks[(static_cast<size_t>(layer - 2) * steps_in_all + s) * chain_threads + tid];
    const uint32_t all[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int q = 0; q < words; ++q) mask[q] = all[q];
  }
  TCAM_DEVICE static void store_mask(const uint32_t (&mask)[words], const FusedBackward& p, int layer, int steps_in_all, int s,
                                     int tid) {
    uint4 v = {mask[0], mask[1], 0, 0};
    if (words == 4) v.z = mask[words - 2], v.w = mask[words - 1];
    p.masks[(static_cast<size_t>(layer - 2) * steps_in_all + s) * chain_threads + tid] = v;
  }

  TCAM_DEVICE static void store_tile(uint16_t* to, const Fragment& f, const Lane<N>& lane) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int s = 0; s < steps; ++s) ptx::store_matrices(to + m * 16 * N + (lane.rows ^ (s << 4)), f[m][s]);
  }

  // h_1 of a step, whose maps stand in `buffer`.
  TCAM_DEVICE static void first_layer(Fragment& h, const Memory& memory, int warp, int buffer, const Lane<N>& lane) {
#pragma unroll
    for (int q = 0; q < steps; ++q)
      Block::first_layer(h, q, memory.stage.a_row(warp, buffer), memory.stage.b_tile(warp, buffer), memory.stage.g_tile(warp),
                         lane);
  }

  // What the head reads at this lane's voxels, the target or the gradient: of output t at rows g + 8 q; with one output, of row
  // g + 8 t alone, in seen[0]. Zero beyond the volume. Early, so that it is there when it is needed.
  struct Seen {
    uint32_t loaded[4];
    bool inside[4];
  };
  TCAM_DEVICE static void look(Seen& seen, const FusedBackward& p, int i, int j, int k0, const Lane<N>& lane) {
    const bool one = p.n_out == 1;
    const int k = k0 + lane.g + (one ? lane.t * 8 : 0);
    const int64_t at =
        (one ? 0 : lane.t * p.channel_stride) + ((static_cast<int64_t>(i) * p.maps.nj + j) * p.maps.nk + k) * p.voxel_stride;
    const bool inside = i < p.maps.ni && j < p.maps.nj && (one || lane.t < p.n_out);
#pragma unroll
    for (int n = 0; n < 4; ++n) seen.loaded[n] = 0, seen.inside[n] = inside && k + n * 8 < p.maps.nk && (n == 0 || !one);
#pragma unroll
    for (int n = 0; n < 4; ++n)
      if (seen.inside[n]) seen.loaded[n] = Elements<float>::load(p.volume, p.dtype, at + n * 8 * p.voxel_stride);
  }

  // The loss and dy there.
  TCAM_DEVICE static void finish(const FusedBackward& p, const float (&out)[MT][4], const Lane<N>& lane, const Seen& seen,
                                 float (&dy)[4], double& loss) {
    using L = LossMaths<Scalar<float>>;
    const bool one = p.n_out == 1;
    const float scale = p.scale ? *p.scale : 1.f;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      dy[n] = 0.f;
      if (!seen.inside[n]) continue;
      float y = out[n >> 1][(n & 1) * 2] + out[n >> 1][(n & 1) * 2 + 1];
      if (n == 0 && one)
#pragma unroll
        for (int q = 1; q < 4; ++q) y = lane.t == q ? out[q >> 1][(q & 1) * 2] + out[q >> 1][(q & 1) * 2 + 1] : y;
      float slope = Elements<float>::value(seen.loaded[n], p.dtype);
      if (p.compares) {
        const float difference = output_of<false>(p.output_activation, y) - slope;
        loss += static_cast<double>(L::value(p.loss, difference, p.beta));
        slope = L::slope(p.loss, difference, p.beta);
      }
      dy[n] = slope * output_slope_of<false>(p.output_activation, y) * scale;
    }
  }

  // A chain warp at one step: where it is, and the masks that its fragment is under.
  struct Step {
    const FusedBackward& p;
    const Memory& memory;
    const Lane<N>& lane;
    int tid, warp, buffer, s, steps_in_all, i, j, k0;
    float* dy_at;
    uint32_t mask[words];

    TCAM_DEVICE uint16_t* h_tile() const { return memory.tiles + warp * 2 * tile; }
    TCAM_DEVICE uint16_t* delta_tile() const { return h_tile() + tile; }
    // h_(layer-1) for the outer warps, once they have read the tile of the step before.
    TCAM_DEVICE void give_h(const Fragment& h) const {
      ptx::barrier_wait(read + warp, pair_threads);
      store_tile(h_tile(), h, lane);
    }
    TCAM_DEVICE void give_delta(const Fragment& delta) const {
      store_tile(delta_tile(), delta, lane);
      ptx::barrier_arrive(written + warp, pair_threads);
    }
  };

  // From h_1 to h_(layer-1) or, in the head, to h_(P+1); the head leaves the masks behind.
  TCAM_DEVICE static void walk_forward(Step& at, Fragment& h) {
    const FusedBackward& p = at.p;
    const int forward = forward_products(p);
    if (forward > 0) first_layer(h, at.memory, at.warp, at.buffer, at.lane);
#pragma unroll 1
    for (int q = 0; q < forward; ++q) {
      Fragment next;
#pragma unroll
      for (int nb = 0; nb < steps; nb += 2) {
        float sum[2][MT][2][4];
        Block::template product<2>(sum, h, at.memory.panels + q * N * N, at.memory.biases + q * N, nb, at.lane);
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int m = 0; m < MT; ++m) Block::to_operand(next[m][nb + e], sum[e][m]);
      }
      copy(h, next);
      if (p.head && p.masks) {
        to_mask(at.mask, h);
        store_mask(at.mask, p, q + 2, at.steps_in_all, at.s, at.tid);
      }
      if (p.weighted && q + 2 == p.layer - 1) at.give_h(h);
    }
  }

  // The last layer, the loss, and dl/dy, which is left behind for the launches to come.
  TCAM_DEVICE static void head(const Step& at, const Fragment& h, const Seen& seen, float (&dy)[4], double& loss,
                               double& dy_sum) {
    const FusedBackward& p = at.p;
    const Lane<N>& lane = at.lane;
    float out[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      out[m][0] = out[m][2] = at.memory.last_bias[lane.t];
      out[m][1] = out[m][3] = 0.f;
    }
#pragma unroll
    for (int q = 0; q < steps; ++q)
#pragma unroll
      for (int m = 0; m < MT; ++m) Block::add_last(out[m], h[m][q], at.memory.split_last, q, lane);
    finish(p, out, lane, seen, dy, loss);
    if (!p.masks) return;
    if (p.n_out == 1) {
      dy_sum += static_cast<double>(dy[0]);
      at.dy_at[lane.t * 8 + lane.g] = dy[0];
    } else if (lane.t < p.n_out) {
#pragma unroll
      for (int n = 0; n < 4; ++n) at.dy_at[lane.t * R + n * 8 + lane.g] = dy[n];
    }
  }

  // h: delta_layer, then delta_(layer-1), by the panel of `layer` and the mask of h_(layer-1).
  TCAM_DEVICE static void step_back(const Step& at, Fragment& h, int layer) {
    const int back = at.p.products + 1 - layer;
    const uint16_t* panel = at.memory.panels + (forward_products(at.p) + back) * N * N;
    Fragment next;
#pragma unroll
    for (int nb = 0; nb < steps; nb += 2) {
      float sum[2][MT][2][4];
      Block::template product_back<2>(sum, h, panel, nb, at.lane);
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float* c = sum[e][m][r >> 1] + (r & 1) * 2;
            next[m][nb + e][r] = masked(T::pack(c[0], c[1]), at.mask, m, nb + e, r);
          }
    }
    copy(h, next);
  }

  // From dl/dy to delta_layer, for the outer warps, and in the launch of layer 2 on to delta_1. `h` is room for a fragment.
  TCAM_DEVICE static void walk_back(Step& at, Fragment& h, const float (&dy)[4]) {
    const FusedBackward& p = at.p;
    const int top = p.products + 1;
    if (p.layer > top) {  // the last layer, of several outputs: delta is dy itself
      if (!p.weighted) return;
      store_outputs(at.delta_tile(), dy, at.lane);
      return ptx::barrier_arrive(written + at.warp, pair_threads);
    }
    if (p.n_out == 1)
      spread_one(h, dy, p.head, at.mask, at.lane);
    else
      spread(h, at.dy_at, p.n_out, at.memory.last, at.mask, at.lane);
#pragma unroll 1
    for (int layer = top; layer > p.layer; --layer) {
      load_mask(at.mask, p, layer - 1, at.steps_in_all, at.s, at.tid);
      step_back(at, h, layer);
    }
    if (p.layer == 2) {  // h_1 again: neither it nor its mask stays in registers from the step's start
      Fragment h1;
      first_layer(h1, at.memory, at.warp, at.buffer, at.lane);
      to_mask(at.mask, h1);
      if (p.weighted) at.give_h(h1);
    }
    if (p.weighted) at.give_delta(h);
    if (p.layer == 2) {
      step_back(at, h, 2);
      write_delta1(p, h, at.i, at.j, at.k0, at.lane);
    }
  }

  TCAM_DEVICE static void chain(const FusedBackward& p, const Memory& memory, const typename Block::Steps& all) {
    const Lane<N> lane;
    const int tid = threadIdx.x, warp = tid >> 5;
    double loss = 0, dy_sum = 0;
    int s = all.begin;
    while (s < all.end) {
      const typename Block::Column column(all, s);
      ptx::barrier_wait(chain_barrier, chain_threads);  // all have left the column before
      Block::stage_column(memory.stage, p.maps, column, tid);
      Block::stage_step(memory.stage, p.maps, column, column.j_first, 0, tid);
#pragma unroll 1
      for (int jb = column.j_first; jb < column.j_last; ++jb, ++s) {
        const int buffer = (jb - column.j_first) & 1;
        ptx::wait_copies();
        ptx::barrier_wait(chain_barrier, chain_threads);  // step jb has landed, and all have read step jb - 1
        if (jb + 1 < column.j_last) Block::stage_step(memory.stage, p.maps, column, jb + 1, buffer ^ 1, tid);
        Step at = {p,
                   memory,
                   lane,
                   tid,
                   warp,
                   buffer,
                   s,
                   all.count(),
                   column.i0 + warp % WI,
                   jb * WJ + warp / WI,
                   column.k0,
                   p.dy + (static_cast<size_t>(s) * chain_warps + warp) * p.n_out * R,
                   {}};
        Seen seen;
        if (p.head) {
          look(seen, p, at.i, at.j, at.k0, lane);
        } else {
          load_mask(at.mask, p, p.products + 1, at.steps_in_all, s, tid);
#pragma unroll
          for (int n = 0; n < 4; ++n) seen.loaded[n] = p.n_out == 1 ? Bits::of(at.dy_at[n * 8 + lane.g]) : 0;
        }
        Fragment h;
        walk_forward(at, h);
        float dy[4];
        if (p.head) {
          head(at, h, seen, dy, loss, dy_sum);
          if (!p.masks) continue;
        } else {
#pragma unroll
          for (int n = 0; n < 4; ++n) dy[n] = Bits::value(seen.loaded[n]);
        }
        walk_back(at, h, dy);
      }
    }
    if (p.head) {
      p.losses[blockIdx.x * chain_threads + tid] = loss;
      p.dy_sums[blockIdx.x * chain_threads + tid] = dy_sum;
    }
  }

  TCAM_DEVICE static void copy(Fragment& to, const Fragment& from) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int r = 0; r < 4; ++r) to[m][s][r] = from[m][s][r];
  }

  // delta_(P+1) without the weights of the one output: dy where the mask is set. The head has dy of row g + 8 t in dy[0].
  TCAM_DEVICE static void spread_one(Fragment& delta, const float (&dy)[4], bool head, const uint32_t (&mask)[words],
                                     const Lane<N>& lane) {
    uint32_t pairs[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float x = head ? __shfl_sync(0xffffffffu, dy[0], (lane.lane & ~3) | n) : dy[n];
      pairs[n] = T::pack(x, x);
    }
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int r = 0; r < 4; ++r) delta[m][s][r] = masked(pairs[m * 2 + (r & 1)], mask, m, s, r);
  }

  // The same of several outputs: the sum over them of dy w.
  TCAM_DEVICE static void spread(Fragment& delta, const float* dy_at, int n_out, const float* last,
                                 const uint32_t (&mask)[words], const Lane<N>& lane) {
    float dy[fused_most_out][4];
#pragma unroll
    for (int o = 0; o < fused_most_out; ++o)
#pragma unroll
      for (int n = 0; n < 4; ++n) dy[o][n] = o < n_out ? dy_at[o * R + n * 8 + lane.g] : 0.f;
#pragma unroll
    for (int s = 0; s < steps; ++s)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float w[fused_most_out][2];
#pragma unroll
        for (int o = 0; o < fused_most_out; ++o) ptx::load_pair(w[o], last + o * N + s * 16 + e * 8 + lane.t * 2);
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float x[2] = {};
#pragma unroll
            for (int o = 0; o < fused_most_out; ++o)
#pragma unroll
              for (int c = 0; c < 2; ++c) x[c] += dy[o][m * 2 + r] * w[o][c];
            delta[m][s][e * 2 + r] = masked(T::pack(x[0], x[1]), mask, m, s, e * 2 + r);
          }
      }
  }

  // delta_L as a tile: output o in column o, zero beyond.
  TCAM_DEVICE static void store_outputs(uint16_t* to, const float (&dy)[4], const Lane<N>& lane) {
    Fragment f;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int r = 0; r < 4; ++r) f[m][s][r] = 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float lo = __shfl_sync(0xffffffffu, dy[n], (lane.lane & ~3) | (lane.t * 2 & 3));
      const float hi = __shfl_sync(0xffffffffu, dy[n], (lane.lane & ~3) | ((lane.t * 2 + 1) & 3));
      f[n >> 1][0][n & 1] = lane.t < 2 ? T::pack(lo, hi) : 0;
    }
    store_tile(to, f, lane);
  }

  TCAM_DEVICE static void write_delta1(const FusedBackward& p, const Fragment& f, int i, int j, int k0, const Lane<N>& lane) {
    if (i >= p.maps.ni || j >= p.maps.nj) return;
    uint16_t* row = p.delta1 + ((static_cast<size_t>(i) * p.maps.nj + j) * p.maps.nk + k0) * N;
#pragma unroll
    for (int n = 0; n < 4; ++n)
      if (k0 + n * 8 + lane.g < p.maps.nk)
#pragma unroll
        for (int q = 0; q < steps / 2; ++q)
          *reinterpret_cast<uint4*>(row + (n * 8 + lane.g) * N + q * 32 + lane.t * 8) = {
              f[n >> 1][2 * q][n & 1], f[n >> 1][2 * q][2 + (n & 1)], f[n >> 1][2 * q + 1][n & 1],
              f[n >> 1][2 * q + 1][2 + (n & 1)]};
  }

  // ---- the outer warps ------------------------------------------------------------------------

  // A quarter of dW: rows from `row` on, columns from `column` on, N/2 of each. The sums of delta come with it, as a product
  // with ones: the warps of the left half sum the first 16 voxels of a tile, those of the right half the others.
  TCAM_DEVICE static void outer(const FusedBackward& p, const Memory& memory, const typename Block::Steps& all) {
    constexpr int row_tiles = N / 32, column_tiles = N / 16;
    const Lane<N> lane;
    const int warp = (threadIdx.x >> 5) - chain_warps, right = warp >> 1, row = (warp & 1) * (N / 2), column = right * (N / 2);
    // Both operands are transposed as they are loaded. Of delta: rows v, then columns; of h: columns, then v.
    const int delta_at =
        ((lane.lane & 7) + ((lane.lane >> 4) << 3)) * N + (((row / 8 + ((lane.lane >> 3) & 1)) ^ lane.swizzle) << 3);
    const int h_at = (lane.lane & 15) * N + (((column / 8 + (lane.lane >> 4)) ^ lane.swizzle) << 3);
    const uint32_t ones[2] = {T::ones, T::ones};
    float sum[row_tiles][column_tiles][4] = {}, row_sum[row_tiles][4] = {};
#pragma unroll 1
    for (int w = 0; w < chain_warps; ++w) ptx::barrier_arrive(read + w, pair_threads);
#pragma unroll 1
    for (int s = all.begin; s < all.end; ++s) {
#pragma unroll 1
      for (int w = 0; w < chain_warps; ++w) {
        const uint16_t* h_tile = memory.tiles + w * 2 * tile;
        ptx::barrier_wait(written + w, pair_threads);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t delta[row_tiles][4];
#pragma unroll
          for (int m = 0; m < row_tiles; ++m)
            ptx::load_matrices_transposed(delta[m], h_tile + tile + half * 16 * N + (delta_at ^ (m << 4)));
#pragma unroll
          for (int n = 0; n < column_tiles / 2; ++n) {
            uint32_t h[4];
            ptx::load_matrices_transposed(h, h_tile + half * 16 * N + (h_at ^ (n << 4)));
#pragma unroll
            for (int m = 0; m < row_tiles; ++m)
#pragma unroll
              for (int e = 0; e < 2; ++e) T::mma(sum[m][2 * n + e], delta[m], h + 2 * e, sum[m][2 * n + e]);
          }
          if (half == right)
#pragma unroll
            for (int m = 0; m < row_tiles; ++m) T::mma(row_sum[m], delta[m], ones, row_sum[m]);
        }
        if (s + 1 < all.end) ptx::barrier_arrive(read + w, pair_threads);
      }
    }
    float* sums = p.sums + static_cast<size_t>(blockIdx.x) * N * N;
    float* row_sums = p.row_sums + (blockIdx.x * 2 + right) * N;
#pragma unroll
    for (int m = 0; m < row_tiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + m * 16 + half * 8 + lane.g;
        if (lane.t == 0) row_sums[r] += row_sum[m][half * 2];
#pragma unroll
        for (int n = 0; n < column_tiles; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) sums[r * N + column + n * 8 + lane.t * 2 + e] += sum[m][n][half * 2 + e];
      }
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
