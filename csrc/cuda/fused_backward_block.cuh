// A block of the fused backward kernel: its arguments, its warps and named barriers, its shared memory.
#pragma once
#include "../maths/half.h"
#include "../maths/loss.h"
#include "fused_tile.cuh"

namespace tcam {

constexpr int fused_most_blocks = 256;  // at most this many blocks, one a multiprocessor; bounds the partial sums
constexpr int fused_backward_wide = 4;  // tiles of a block's teams at a time, neighbours along i within a team
constexpr int fused_backward_step_voxels = 32 * fused_backward_wide;
constexpr int fused_backward_most_chain_threads = 64 * fused_backward_wide;

// Arguments of a launch of fused_backward_kernel; N is the padded width, P = products, R the voxels of a tile.
struct FusedBackward {
  FusedMaps maps;
  const uint16_t* weights;       // (P, N outputs, N inputs): W_2 to W_(P+1) in the 16-bit format
  const uint16_t* weights_back;  // (P, N, N): their transposes, which take delta_l to delta_(l-1); see `diag(w)` above
  const float* biases;           // (P, N): b_2 to b_(P+1)
  const float* last;             // (n_out, N): W_L
  const float* last_bias;        // (n_out)
  int products, n_out;
  int layer;                // the layer whose weight gradient this launch computes, L or P+1 down to 2
  bool head, weighted;      // head: this is the first launch; weighted: the weight gradient is wanted
  const float* last_scale;  // factor of W_L on the way back, so of every delta below it; null: 1. weights_back includes it
  // Read or written by the head alone:
  const void* volume;  // the target or the gradient of the output, at the first voxel
  int dtype;
  int64_t channel_stride, voxel_stride;
  Final<float> output_activation;
  bool compares;  // true: volume is the target; false: the gradient
  Loss loss;
  double beta;
  const float* scale;  // factor of dl/dy; null: 1
  double* losses;      // (blocks, chain threads) = the sum of each thread's losses
  double* dy_sums;     // (blocks, chain threads) = with one output, the sum of each thread's dl/dy
  // Written by the head, read by later launches; not where only losses are wanted, and masks is null:
  void* masks;  // (P, steps, threads of a team) of FusedBackwardBlock::Mask: where h_2 to h_(P+1) are positive
  float* dy;    // (steps, tiles of a team, n_out, R): dl/dy
  // Results:
  uint16_t* delta1;  // (ni, nj, nk, N), channels in the order of delta1_column; written by the launch of layer 2
  float* sums;       // (blocks, N, N) += dW_layer
  float* row_sums;   // (blocks, 2, N) += the sum of delta_layer over voxels, in two parts
};

template <class T, int N, int MT>
struct FusedBackwardBlock {
  // A block's chain warps are one team of four tiles, or two teams (warpgroups) of two.
  static constexpr int teams = 2 / MT, tiles = fused_backward_wide, WI = tiles / teams, WJ = 1, outer_warps = 4;
  using Team = FusedTeam<T, N, MT, WI, WJ>;
  using Fragment = typename Team::Fragment;
  static constexpr int chain_threads = teams * Team::threads, threads = chain_threads + 32 * outer_warps;
  static constexpr int steps = Team::steps, tile = Team::tile, R = Team::R, share = Team::share, lines = Team::lines;
  static_assert(chain_threads <= fused_backward_most_chain_threads, "");
  // A given tile consists of N / 64 blocks of 64 channels, each with rows of 64 numbers (R, 64). The 16-byte chunk c of row r
  // is stored at chunk c ^ (r & 7).
  static constexpr int given_block = R * 64;
  // Named barriers: chain_barrier + t joins the warps of team t; written + w says that the chain warps of tile w have written h
  // and delta, read + w that the outer warps have read them.
  static constexpr int tile_threads = 32 * (share + outer_warps);  // threads at a barrier of a tile
  static constexpr int chain_barrier = 1, written = chain_barrier + teams, read = written + tiles;

  // A thread's bits of where its rows of a layer are positive.
  static constexpr int words = MT * N / 64;
  struct alignas(4 * words) Mask {
    uint32_t word[words];
  };

  // The number of products of the walk forward: up to h_(P+1) in the head, else up to h_(layer-1).
  TCAM_HD static int forward_products(const FusedBackward& p) { return p.head ? p.products : p.layer - 2; }
  // The number of products of the walk back: down to delta_layer, or to delta_1 in the launch of layer 2.
  TCAM_HD static int back_products(const FusedBackward& p) {
    return p.layer > p.products + 1 ? 0 : p.products + 1 - p.layer + (p.layer == 2 ? 1 : 0);
  }

  // The steps of team t of this block.
  TCAM_DEVICE static typename Team::Steps steps_of(const FusedBackward& p, int t) {
    return typename Team::Steps(p.maps, blockIdx.x * teams + t, gridDim.x * teams);
  }

  static size_t shared_bytes(const FusedBackward& p) {
    const size_t panels = static_cast<size_t>(forward_products(p) + back_products(p)) * N * N;
    return 2 * (panels + tiles * 2 * tile + teams * Team::Stage::elements + 8 * N) +
           4 * (p.products * N + fused_most_out * N + fused_most_out) + 256;
  }

  // The arrays in shared memory.
  struct Memory {
    uint16_t* panels;                  // (products, N, N): the panels of the walk forward, then those of the walk back
    uint16_t* given;                   // (tiles, 2, N / 64, R, 64): each tile's h_(layer-1), then its delta_layer
    uint16_t* maps;                    // (teams, Stage::elements)
    uint16_t* split_last;              // (8, N): FusedTile::split_last
    float *biases, *last, *last_bias;  // (P, N); (fused_most_out, N), times last_scale; (fused_most_out)
    TCAM_DEVICE Memory(Shared& shared, const FusedBackward& p)
        : panels(shared.take<uint16_t>((forward_products(p) + back_products(p)) * N * N)),
          given(shared.take<uint16_t>(tiles * 2 * tile)),
          maps(shared.take<uint16_t>(teams * Team::Stage::elements)),
          split_last(shared.take<uint16_t>(8 * N)),
          biases(shared.take<float>(p.products * N)),
          last(shared.take<float>(fused_most_out * N)),
          last_bias(shared.take<float>(fused_most_out)) {}
  };
};

}  // namespace tcam
