// The outer warps of the fused backward kernel: they sum the weight gradient of the launch's layer from the tiles that the chain warps give.
#pragma once
#include "fused_backward_block.cuh"

namespace tcam {

template <class T, int N, int MT>
struct FusedBackwardOuter : FusedBackwardBlock<T, N, MT> {
  using Base = FusedBackwardBlock<T, N, MT>;
  using Base::tile, Base::tiles, Base::chain_threads, Base::tile_threads, Base::written, Base::read;
  using typename Base::Block, typename Base::Memory;

  // One outer warp: p.sums[block] += its quarter of dW = sum over voxels of delta^T h, N/2 rows from `row` on and N/2 columns
  // from `column` on; and p.row_sums[block] += the sums of delta, computed as a product with ones. Of each tile's 32 voxels,
  // the warps of the left half of dW sum delta over the first 16 and those of the right half over the others. Tiles are added
  // in the order of steps, then of i.
  TCAM_DEVICE static void outer(const FusedBackward& p, const Memory& memory, const typename Block::Steps& all) {
    constexpr int row_tiles = N / 32, column_tiles = N / 16;
    const Lane<N> lane;
    const int warp = (static_cast<int>(threadIdx.x) - chain_threads) >> 5, right = warp >> 1, row = (warp & 1) * (N / 2), column = right * (N / 2);
    // Both operands are transposed by the load. From one 8 x 8 matrix of a load to the next, columns advance first and then
    // voxels for delta (an A operand), voxels first and then columns for h (two B operands).
    const int delta_at =
        ((lane.lane & 7) + ((lane.lane >> 4) << 3)) * N + (((row / 8 + ((lane.lane >> 3) & 1)) ^ lane.swizzle) << 3);
    const int h_at = (lane.lane & 15) * N + (((column / 8 + (lane.lane >> 4)) ^ lane.swizzle) << 3);
    const uint32_t ones[2] = {T::ones, T::ones};
    float sum[row_tiles][column_tiles][4] = {}, row_sum[row_tiles][4] = {};
#pragma unroll 1
    for (int w = 0; w < tiles; ++w) ptx::barrier_arrive(read + w, tile_threads);
#pragma unroll 1
    for (int s = all.begin; s < all.end; ++s) {
#pragma unroll 1
      for (int w = 0; w < tiles; ++w) {
        const uint16_t* h_tile = memory.given + w * 2 * tile;
        ptx::barrier_wait(written + w, tile_threads);
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
        if (s + 1 < all.end) ptx::barrier_arrive(read + w, tile_threads);
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

}  // namespace tcam
