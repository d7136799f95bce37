// The outer warps of the fused backward kernel: they sum the weight gradient of the launch's layer from the tiles that the
// chain warps give.
#pragma once
#include "fused_backward_block.cuh"

namespace tcam {

template <class T, int N, int MT>
struct FusedBackwardOuter : FusedBackwardBlock<T, N, MT> {
  using Base = FusedBackwardBlock<T, N, MT>;
  using Base::given_block, Base::teams, Base::WI, Base::steps_of;
  using Base::tile, Base::tiles, Base::chain_threads, Base::tile_threads, Base::written, Base::read, Base::R;
  using typename Base::Team, typename Base::Memory;

  // The outer warps: p.sums[block] += dW = sum over voxels of delta^T h, and p.row_sums[block] += the sums of delta, computed
  // as products with ones. Tiles are added in the order of steps, then teams, then i.
  TCAM_DEVICE static void outer(const FusedBackward& p, const Memory& memory) {
    if constexpr (MT == 1)
      outer_of_warpgroup(p, memory);
    else
      outer_of_warp(p, memory);
  }

 private:
  // Calls add(h_tile, delta_tile) for every tile that the block's teams give, between the barriers of the tile.
  template <class Add>
  TCAM_DEVICE static void each_tile(const FusedBackward& p, const Memory& memory, Add add) {
    int count[teams], most = 0;
#pragma unroll
    for (int t = 0; t < teams; ++t) {
      const typename Team::Steps all = steps_of(p, t);
      count[t] = all.end - all.begin;
      most = count[t] > most ? count[t] : most;
      for (int w = 0; w < WI && count[t] > 0; ++w) ptx::barrier_arrive(read + t * WI + w, tile_threads);
    }
#pragma unroll 1
    for (int s = 0; s < most; ++s)
#pragma unroll 1
      for (int w = 0; w < tiles; ++w) {
        const int left = (teams == 1 || w < WI ? count[0] : count[teams - 1]) - s;  // steps of the tile's team
        if (left <= 0) continue;
        const uint16_t* h_tile = memory.given + w * 2 * tile;
        ptx::barrier_wait(written + w, tile_threads);
        add(h_tile, h_tile + tile);
        if (left > 1) ptx::barrier_arrive(read + w, tile_threads);
      }
  }

  // The offset in a given tile, from 16 of its rows on, from which a lane loads an A operand of delta^T for the 16 channels
  // from `channel` on, transposed by the load. From one 8 x 8 matrix of a load to the next, channels advance first, then
  // voxels.
  TCAM_DEVICE static int delta_at(int channel, const Lane<N>& lane) {
    return channel / 64 * given_block + ((lane.lane & 7) + ((lane.lane >> 4) << 3)) * 64 +
           (((channel % 64 / 8 + ((lane.lane >> 3) & 1)) ^ lane.swizzle) << 3);
  }

  // With wgmma: the warpgroup has all of dW, warp w the 16 rows of each 64 from 16 w on, and their sums of delta.
  TCAM_DEVICE static void outer_of_warpgroup(const FusedBackward& p, const Memory& memory) {
    constexpr int blocks = N / 64;
    const Lane<N> lane;
    const int warp = (static_cast<int>(threadIdx.x) - chain_threads) >> 5;
    const uint32_t ones[2] = {T::ones, T::ones};
    float sum[blocks][N / 2] = {}, row_sum[blocks][4] = {};
    each_tile(p, memory, [&](const uint16_t* h_tile, const uint16_t* delta_tile) {
      const ptx::Operand h(h_tile, given_block), delta(delta_tile);
      ptx::warpgroup_fence();
#pragma unroll
      for (int half = 0; half < R / 16; ++half)
#pragma unroll
        for (int b = 0; b < blocks; ++b)
          ptx::warpgroup_outer_product<T>(sum[b], delta.at(b * given_block + half * 16 * 64), h.at(half * 16 * 64));
      ptx::warpgroup_commit();
#pragma unroll
      for (int half = 0; half < R / 16; ++half)
#pragma unroll
        for (int b = 0; b < blocks; ++b) {
          uint32_t a[4];
          ptx::load_matrices_transposed(a, delta_tile + half * 16 * 64 + delta_at(b * 64 + warp * 16, lane));
          T::mma(row_sum[b], a, ones, row_sum[b]);
        }
      ptx::warpgroup_wait();
    });
#pragma unroll
    for (int b = 0; b < blocks; ++b) add_rows(p, b * 64 + warp * 16, 0, 0, sum[b], row_sum[b], lane);
  }

  // With mma.sync: the warp has a quarter of dW, N/2 rows from `row` on and N/2 columns from `column` on. Of each tile's 32
  // voxels, the warps of the left half of dW sum delta over the first 16 and those of the right half over the others.
  TCAM_DEVICE static void outer_of_warp(const FusedBackward& p, const Memory& memory) {
    constexpr int row_tiles = N / 32, column_tiles = N / 16;
    const Lane<N> lane;
    const int warp = (static_cast<int>(threadIdx.x) - chain_threads) >> 5;
    const int right = warp >> 1, row = (warp & 1) * (N / 2), column = right * (N / 2);
    // Two B operands of h, transposed by the load: from one 8 x 8 matrix to the next, voxels advance first, then channels.
    const int h_at =
        column / 64 * given_block + (lane.lane & 15) * 64 + (((column % 64 / 8 + (lane.lane >> 4)) ^ lane.swizzle) << 3);
    const uint32_t ones[2] = {T::ones, T::ones};
    float sum[row_tiles][column_tiles * 4] = {}, row_sum[row_tiles][4] = {};
    each_tile(p, memory, [&](const uint16_t* h_tile, const uint16_t* delta_tile) {
#pragma unroll
      for (int half = 0; half < R / 16; ++half) {
        uint32_t delta[row_tiles][4];
#pragma unroll
        for (int m = 0; m < row_tiles; ++m)
          ptx::load_matrices_transposed(delta[m], delta_tile + half * 16 * 64 + (delta_at(row, lane) ^ (m << 4)));
#pragma unroll
        for (int n = 0; n < column_tiles / 2; ++n) {
          uint32_t h[4];
          ptx::load_matrices_transposed(h, h_tile + half * 16 * 64 + (h_at ^ (n << 4)));
#pragma unroll
          for (int m = 0; m < row_tiles; ++m)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float (&c)[4] = *reinterpret_cast<float (*)[4]>(&sum[m][(2 * n + e) * 4]);
              T::mma(c, delta[m], h + 2 * e, c);
            }
        }
        if (half == right)
#pragma unroll
          for (int m = 0; m < row_tiles; ++m) T::mma(row_sum[m], delta[m], ones, row_sum[m]);
      }
    });
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) add_rows(p, row + m * 16, column, right, sum[m], row_sum[m], lane);
  }

  // Adds the accumulators of 16 rows of dW from `row` on, and of its columns from `column` on, to p.sums, and their sums of
  // delta to a part of p.row_sums.
  template <int accumulators>
  TCAM_DEVICE static void add_rows(const FusedBackward& p, int row, int column, int part, const float (&sum)[accumulators],
                                   const float (&row_sum)[4], const Lane<N>& lane) {
    float* sums = p.sums + static_cast<size_t>(blockIdx.x) * N * N;
    float* row_sums = p.row_sums + (blockIdx.x * 2 + part) * N;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + half * 8 + lane.g;
      if (lane.t == 0) row_sums[r] += row_sum[half * 2];
#pragma unroll
      for (int n = 0; n < accumulators / 4; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) sums[r * N + column + n * 8 + lane.t * 2 + e] += sum[n * 4 + half * 2 + e];
    }
  }
};

}  // namespace tcam
