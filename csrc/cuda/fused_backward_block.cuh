// A block of the backward kernel: its parameters, its warps and barriers, its shared memory.
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
struct FusedBackwardBlock {
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
};

}  // namespace tcam
