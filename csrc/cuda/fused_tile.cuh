// The tile that forward and backward of the fused kernels share: R = 32 voxels, neighbours along k at one (i, j), that go
// through layers of N channels on tensor cores.
//
// The voxels are the rows of products. MT is the number of blocks of 16 rows that a warp owns, and chooses the instruction:
//   MT = 2: a warp owns a tile, and multiplies with mma.sync m16n8k16;
//   MT = 1: two warps share a tile, and four (a warpgroup, two tiles) multiply with wgmma, on sm_90a only.
// Activations stay in registers from layer to layer: the accumulators of one product, rounded, are the A operand of the next.
// Tiles in shared memory have rows of N 16-bit numbers and are swizzled: the 16-byte chunk c of row r is stored at chunk
// c ^ (r & 7), so that ldmatrix has no bank conflicts.
//
// Names in all fused kernels: lane = 4 g + t as in the PTX ISA's fragments; m: a block of 16 rows; s (or q): a k-step, that is
// 16 columns; e: 8 of these columns; r: a register of an A operand.
#pragma once
#include "../maths/activation.h"
#include "warpgroup.cuh"

namespace tcam {

constexpr int fused_most_out = 4, fused_most_products = 3;

// The maps of the first layer in a 16-bit format, padded to N channels: h_1(i,j,k) = relu(A[i,j] + B[j,k] + G[i,k]).
struct FusedMaps {
  const uint16_t *a, *b, *g;  // (ni, nj, N), (nj, nk, N), (ni, nk, N)
  int ni, nj, nk;
};

// The channel at position `at` of a row of delta1. Of every 32 channels, the 8 in one lane's fragment are adjacent, so that a
// lane writes 16 bytes at once.
TCAM_HD int delta1_column(int at) { return at / 32 * 32 + at / 2 % 4 * 8 + at / 8 % 4 * 2 + at % 2; }

// A lane's offsets for ldmatrix into swizzled matrices, at k-step 0. The offset at k-step s is the same ^ (16 s), because the
// swizzle is an exclusive or.
template <int N>
struct Lane {
  int lane, g, t, swizzle;
  int rows;     // A operands: row lane & 15, chunk parity lane >> 4
  int weights;  // B operands of h W^T, from W (output, input)
  TCAM_DEVICE Lane()
      : lane(threadIdx.x & 31),
        g(lane >> 2),
        t(lane & 3),
        swizzle(lane & 7),
        rows((lane & 15) * N + (((lane >> 4) ^ swizzle) << 3)),
        weights(((lane & 7) + ((lane >> 4) << 3)) * N + ((((lane >> 3) & 1) ^ swizzle) << 3)) {}
  // Called once a step: otherwise the offsets of all k-steps occupy registers from step to step.
  TCAM_DEVICE void forget() {
    ptx::forget(swizzle);
    ptx::forget(rows);
    ptx::forget(weights);
  }
};

template <class T, int N, int MT>
struct FusedTile {
  static constexpr int R = 32, tile = R * N, steps = N / 16, chunks = N / 8;
  static constexpr int share = 2 / MT;  // warps of a tile
  static constexpr int lines = 2 * MT;  // rows that a lane has: g + 8 n
  static_assert((MT == 1 || MT == 2) && (N == 64 || N == 128), "");
  using Fragment =
      uint32_t[MT][steps][4];  // [m][s][r]: rows 16 m + g + 8 (r & 1), columns 16 s + 8 (r >> 1) + 2 t and the next

  // The first row of a warp in its tile.
  TCAM_DEVICE static int first_row(int warp) { return warp % share * 16; }

  // The offset of a 16-byte chunk in a swizzled matrix.
  TCAM_DEVICE static int at(int row, int chunk) { return row * N + ((chunk ^ (row & 7)) << 3); }

  // Starts copying a matrix W (N outputs, N inputs) from global memory to a panel in shared memory, the B operand of h W^T.
  // Called by all `threads` threads of a group, each with its number tid. For wgmma a panel is N / 64 matrices of 64 inputs
  // each, from an address divisible by 1024.
  TCAM_DEVICE static void stage_panel(uint16_t* to, const uint16_t* from, int tid, int threads) {
    for (int c = tid; c < N * chunks; c += threads) {
      const int row = c / chunks, chunk = c % chunks;
      ptx::copy16(to + (MT == 2 ? at(row, chunk) : chunk / 8 * N * 64 + row * 64 + (((chunk ^ row) & 7) << 3)),
                  from + static_cast<size_t>(c) * 8);
    }
  }
  // Waits for the thread's copies of panels. A barrier must follow before the first product.
  TCAM_DEVICE static void wait_panels() {
    ptx::wait_copies();
    if (MT == 1) ptx::products_fence();
  }

  // out[:][s] = k-step s of h_1 = relu(A + B + G), from a_row (N) and the warp's rows of the swizzled tiles b_rows and g_rows.
  // All rows of the tile share a_row, which the lanes read by broadcast.
  TCAM_DEVICE static void first_layer(Fragment& out, int s, const uint16_t* a_row, const uint16_t* b_rows,
                                      const uint16_t* g_rows, const Lane<N>& lane) {
    uint32_t a[4];
    ptx::load_matrices(a, a_row + ((s & ~1) * 2 + (lane.lane >> 3)) * 8);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      uint32_t bv[4], gv[4];
      const int offset = m * 16 * N + (lane.rows ^ (s << 4));
      ptx::load_matrices(bv, b_rows + offset);
      ptx::load_matrices(gv, g_rows + offset);
#pragma unroll
      for (int r = 0; r < 4; ++r) out[m][s][r] = T::add_relu(T::add(a[(s & 1) * 2 + (r >> 1)], gv[r]), bv[r]);
    }
  }

  // Multiplies: in W^T, plus the biases (N) where `biased`, from the panel of W. Each sum adds its k-steps in ascending order,
  // and its bias before (mma.sync) or after them (wgmma). For every s, calls meanwhile(s), for work that does not need the
  // product, and then each(s, m, sum) with the accumulators sum[e] of rows 16 m on and columns 16 s + 8 e on. With mma.sync,
  // `blocks` k-steps of columns are in registers at a time, and `each` is called while `in` is still needed; with wgmma all
  // are, and `each` is called after the last use of `in`.
  template <int blocks, bool biased, class Meanwhile, class Each>
  TCAM_DEVICE static void multiply(const Fragment& in, const uint16_t* panel, const float* biases, const Lane<N>& lane,
                                   Meanwhile meanwhile, Each each) {
    if constexpr (MT == 1) {
      float sum[N / 2];
      const ptx::Operand weights(panel);
      ptx::warpgroup_fence();
      ptx::warpgroup_product<T, true>(sum, in[0][0], weights, 0);
#pragma unroll
      for (int s = 1; s < steps; ++s) ptx::warpgroup_product<T, false>(sum, in[0][s], weights.at(s / 4 * N * 64), s % 4);
      ptx::warpgroup_commit();
#pragma unroll
      for (int s = 0; s < steps; ++s) meanwhile(s);
      ptx::warpgroup_wait();
#pragma unroll
      for (int s = 0; s < steps; ++s) {
        float c[2][4];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float bias[2];
          if (biased) ptx::load_pair(bias, biases + s * 16 + e * 8 + lane.t * 2);
#pragma unroll
          for (int r = 0; r < 4; ++r) c[e][r] = biased ? sum[8 * s + 4 * e + r] + bias[r & 1] : sum[8 * s + 4 * e + r];
        }
        each(s, 0, c);
      }
    } else {
#pragma unroll
      for (int nb = 0; nb < steps; nb += blocks) {
        float sum[blocks][MT][2][4];
        multiply_columns<biased>(sum, in, panel, biases, nb, lane);
#pragma unroll
        for (int q = 0; q < blocks; ++q) {
          meanwhile(nb + q);
#pragma unroll
          for (int m = 0; m < MT; ++m) each(nb + q, m, sum[q][m]);
        }
      }
    }
  }
  // sum = columns [16 nb, 16 (nb + blocks)) of in W^T + bias, by mma.sync.
  template <bool biased, int blocks>
  TCAM_DEVICE static void multiply_columns(float (&sum)[blocks][MT][2][4], const Fragment& in, const uint16_t* panel,
                                           const float* biases, int nb, const Lane<N>& lane) {
    float bias[blocks][2][4];
#pragma unroll
    for (int q = 0; q < blocks; ++q)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        bias[q][e][0] = bias[q][e][1] = 0.f;
        if (biased) ptx::load_pair(bias[q][e], biases + (nb + q) * 16 + e * 8 + lane.t * 2);
        bias[q][e][2] = bias[q][e][0];
        bias[q][e][3] = bias[q][e][1];
      }
#pragma unroll
    for (int s = 0; s < steps; ++s)
#pragma unroll
      for (int q = 0; q < blocks; ++q) {
        uint32_t w[4];
        ptx::load_matrices(w, panel + (nb + q) * 16 * N + (lane.weights ^ (s << 4)));
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int e = 0; e < 2; ++e) T::mma(sum[q][m][e], in[m][s], w + 2 * e, s ? sum[q][m][e] : bias[q][e]);
      }
  }

  // The ReLU of the accumulators of 16 columns, rounded, as an A operand for a k-step of the next product.
  TCAM_DEVICE static void to_operand(uint32_t (&out)[4], const float (&c)[2][4]) {
    out[0] = T::pack_relu(c[0][0], c[0][1]);
    out[1] = T::pack_relu(c[0][2], c[0][3]);
    out[2] = T::pack_relu(c[1][0], c[1][1]);
    out[3] = T::pack_relu(c[1][2], c[1][3]);
  }

  // Writes the last layer's float32 weights (n_out, N) to shared memory as a swizzled B operand `to` (8, N) in 16 bits. Rows 2o
  // and 2o + 1 are the high and the low part of output o, to be added: high + low is nearly as accurate as float32. A single
  // output fills all four pairs of rows.
  TCAM_DEVICE static void split_last(uint16_t* to, const float* weights, int n_out, int tid, int threads) {
    for (int c = tid; c < N; c += threads)
      for (int n = 0; n < 8; ++n) {
        const int o = n_out == 1 ? 0 : n / 2;
        const float w = o < n_out ? weights[o * N + c] : 0.f;
        const uint16_t high = T::round(w);
        to[at(n, c >> 3) + (c & 7)] = n & 1 ? T::round(w - T::widen(high)) : high;
      }
  }
  // out += h times the last layer over k-step s, with h the A operand of that step. Accumulators 0 and 1 are the high and low
  // parts of output t at row g, accumulators 2 and 3 those at row g + 8.
  TCAM_DEVICE static void add_last(float (&out)[4], const uint32_t (&h)[4], const uint16_t* split, int s, const Lane<N>& lane) {
    uint32_t w[4];  // B operands of two k-steps; the compiler merges the loads of both
    ptx::load_matrices(w, split + lane.swizzle * N + (((s / 2 * 4 + (lane.lane >> 3)) ^ lane.swizzle) << 3));
    T::mma(out, h, w + 2 * (s & 1), out);
  }
};

// A team of warps with WI x WJ tiles, neighbours along i and j, and its walk over a volume. A step is one such set of tiles. A
// column consists of the steps that share a tile of k and WI values of i: only j advances, so the tiles of G stay in shared
// memory. Steps are numbered column by column, and each team walks an equal range of them. Tile w has the warps w * share to
// (w + 1) * share - 1; its i is i0 + w % WI, its j is jb * WJ + w / WI.
//
// With mma.sync a block has one team. With wgmma it has several of a warpgroup each, which wait for nothing of each other, so
// that one multiplies while another does something else.
template <class T, int N, int MT, int WI, int WJ>
struct FusedTeam : FusedTile<T, N, MT> {
  using Tile = FusedTile<T, N, MT>;
  static constexpr int R = Tile::R, tile = Tile::tile, chunks = Tile::chunks, share = Tile::share;
  static constexpr int tiles = WI * WJ, warps = tiles * share, threads = warps * 32;
  static_assert(MT == 2 || warps == 4, "a warpgroup");

  struct Steps {
    int tiles_k, tiles_i, tiles_j, begin, end;
    TCAM_HD Steps(const FusedMaps& maps, int team, int teams)
        : tiles_k((maps.nk + R - 1) / R), tiles_i((maps.ni + WI - 1) / WI), tiles_j((maps.nj + WJ - 1) / WJ) {
      begin = static_cast<int>(static_cast<int64_t>(count()) * team / teams);
      end = static_cast<int>(static_cast<int64_t>(count()) * (team + 1) / teams);
    }
    TCAM_HD int count() const { return tiles_k * tiles_i * tiles_j; }  // below 2^31, see FusedMlp::refuses
  };

  // The steps of one column that a team walks from step s on: j tiles [j_first, j_last) at voxels i0 and k0.
  struct Column {
    int i0, k0, j_first, j_last;
    TCAM_DEVICE Column(const Steps& steps, int s) {
      const int column = s / steps.tiles_j;
      j_first = s % steps.tiles_j;
      j_last = steps.end - s < steps.tiles_j - j_first ? j_first + (steps.end - s) : steps.tiles_j;
      k0 = column % steps.tiles_k * R;
      i0 = column / steps.tiles_k * WI;
    }
  };

  // The tiles of the maps in shared memory: G of the column (WI, R, N), B (WJ, R, N) and A (tiles, N) of a step.
  struct Stage {
    uint16_t *g, *b, *a;
    static constexpr int elements = (WI + WJ) * tile + tiles * N;
    TCAM_DEVICE explicit Stage(uint16_t* at) : g(at), b(at + WI * tile), a(at + (WI + WJ) * tile) {}
    // The rows of a warp of the team.
    TCAM_DEVICE const uint16_t* g_rows(int warp) const { return g + warp / share % WI * tile + Tile::first_row(warp) * N; }
    TCAM_DEVICE const uint16_t* b_rows(int warp) const { return b + warp / share / WI * tile + Tile::first_row(warp) * N; }
    TCAM_DEVICE const uint16_t* a_row(int warp) const { return a + warp / share * N; }
  };

  // Tile::first_layer for a warp of the team.
  TCAM_DEVICE static void first_layer(typename Tile::Fragment& out, int s, const Stage& from, int warp, const Lane<N>& lane) {
    Tile::first_layer(out, s, from.a_row(warp), from.b_rows(warp), from.g_rows(warp), lane);
  }

  // Indices past the end are clamped: their voxels are computed but never used.
  TCAM_DEVICE static int clamped(int x, int n) { return x < n ? x : n - 1; }

  // Starts copying the column's tiles of G. Called by all threads of the team.
  TCAM_DEVICE static void stage_column(const Stage& to, const FusedMaps& maps, const Column& c, int tid) {
#pragma unroll 1
    for (int e = tid; e < WI * R * chunks; e += threads) {
      const int r = e / chunks;
      ptx::copy16(to.g + Tile::at(r, e % chunks),
                  maps.g +
                      (static_cast<size_t>(clamped(c.i0 + r / R, maps.ni)) * maps.nk + clamped(c.k0 + r % R, maps.nk)) * N +
                      e % chunks * 8);
    }
  }

  // Starts copying B and A of j tile jb, and commits all copies started so far. Called by the same threads.
  TCAM_DEVICE static void stage_step(const Stage& to, const FusedMaps& maps, const Column& c, int jb, int tid) {
    ptx::forget(tid);                       // otherwise the addresses of all copies occupy registers from step to step
    constexpr int pass = threads / chunks;  // rows that the team copies at once
    const int r0 = tid / chunks, chunk = tid % chunks;
    const uint16_t* from = maps.b + static_cast<int64_t>(jb) * WJ * maps.nk * N + chunk * 8;
#pragma unroll
    for (int u = 0; u < (WJ * R + pass - 1) / pass; ++u) {
      const int r = r0 + u * pass;
      if (WJ * R % pass && r >= WJ * R) break;
      const int64_t rows = WJ == 1 ? 0 : static_cast<int64_t>(clamped(jb * WJ + r / R, maps.nj) - jb * WJ) * maps.nk;
      ptx::copy16(to.b + (pass % 8 ? Tile::at(r, chunk) : Tile::at(r0, chunk) + u * pass * N),
                  from + (rows + clamped(c.k0 + r % R, maps.nk)) * N);
    }
    if (tid < tiles * chunks) {
      const int w = tid / chunks;
      ptx::copy16(
          to.a + w * N + tid % chunks * 8,
          maps.a + (static_cast<size_t>(clamped(c.i0 + w % WI, maps.ni)) * maps.nj + clamped(jb * WJ + w / WI, maps.nj)) * N +
              tid % chunks * 8);
    }
    ptx::commit_copies();
  }
};

}  // namespace tcam
