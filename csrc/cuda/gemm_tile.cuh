// The tiles of gemm.cuh: what a block accumulates of C, from panels of A and B in shared memory.
//
// A panel has `lines` rows of A or columns of B, and `depth` of k; element (line, k) is at line * line_step + k * k_step.
// `deep`: whether it comes from memory along k. add() adds the product of two panels. each(f) calls f(row, column, sums) for
// the thread's groups of sums, which are neighbours in a row of C.
#pragma once
#include "ptx.cuh"
#include "vector.cuh"

namespace tcam {

constexpr int gemm_threads = 256;

// The number of type To with the bits of `from`.
template <class To, class From>
TCAM_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Fused multiply-adds in Real. A thread owns (rows/16) x (columns/16) elements, in groups of up to 4 x 4 neighbours. A warp's
// threads form 4 rows of 8. Each half of a warp reads 2 groups of A and 8 groups of B, so that reads of 16 bytes are free of
// bank conflicts.
template <class Real_, int rows_, int columns_, int depth_>
struct Scalars {
  static constexpr int rows = rows_, columns = columns_, depth = depth_, blocks = 2;
  static constexpr bool large = rows == 128;
  static constexpr int own_rows = rows / 16, own_columns = columns / 16;
  static constexpr int row_group = own_rows < 4 ? own_rows : 4, group = own_columns < 4 ? own_columns : 4;
  using Real = Real_;
  using Number = Real;  // type of the panels' elements
  template <int lines, bool deep>
  struct Panel {
    static constexpr int line_step = 1, k_step = lines + 4, size = depth * k_step;
  };
  Real sum[own_rows][own_columns / group][group] = {};

  TCAM_DEVICE static Real number(Real x) { return x; }
  TCAM_DEVICE static int first_row() {
    return (threadIdx.x / 64 * 4 + threadIdx.x % 32 / 16 * 2 + threadIdx.x % 2) * row_group;
  }
  TCAM_DEVICE static int first_column() { return (threadIdx.x / 32 % 2 * 8 + threadIdx.x % 16 / 2) * group; }

  template <class PanelA, class PanelB>
  TCAM_DEVICE void add(const Real* a, const Real* b) {
    a += first_row(), b += first_column();
#pragma unroll
    for (int q = 0; q < depth; ++q) {
      Real x[own_rows / row_group][row_group], y[own_columns / group][group];
#pragma unroll
      for (int r = 0; r < own_rows / row_group; ++r) load_vector(x[r], a + q * PanelA::k_step + r * 16 * row_group);
#pragma unroll
      for (int c = 0; c < own_columns / group; ++c) load_vector(y[c], b + q * PanelB::k_step + c * 16 * group);
#pragma unroll
      for (int r = 0; r < own_rows; ++r)
#pragma unroll
        for (int c = 0; c < own_columns; ++c)
          sum[r][c / group][c % group] += x[r / row_group][r % row_group] * y[c / group][c % group];
    }
  }

  static constexpr int across = own_columns / group, groups = own_rows * across;
  TCAM_DEVICE static int row(int g) { return first_row() + g / across / row_group * 16 * row_group + g / across % row_group; }
  TCAM_DEVICE static int column(int g) { return first_column() + g % across * 16 * group; }
  TCAM_DEVICE const Real* sums(int g) const { return sum[g / across][g % across]; }
};

// On tensor cores: float32 numbers rounded to TensorFloat-32 (10 bits of mantissa), summed in float32. The warps form 2 rows of
// 4. The panels' steps keep the reads of a fragment free of bank conflicts.
template <int rows_, int columns_>
struct TensorFloats {
  static constexpr int rows = rows_, columns = columns_, depth = 16, blocks = 2, group = 2;
  static constexpr bool large = rows == 128;
  static constexpr int tall = rows / 32, wide = columns / 32;  // products m16n8k8 of a warp
  using Real = float;
  using Number = uint32_t;
  template <int lines, bool deep>
  struct Panel {
    static constexpr int line_step = deep ? depth + 4 : 1, k_step = deep ? 1 : lines + 8;
    static constexpr int size = deep ? lines * line_step : depth * k_step;
  };
  float sum[tall][wide][4] = {};

  TCAM_DEVICE static uint32_t number(float x) { return ptx::to_tensor_float(x); }
  TCAM_DEVICE static int first_row() { return threadIdx.x / 128 * (tall * 16) + threadIdx.x % 32 / 4; }
  TCAM_DEVICE static int first_column() { return threadIdx.x / 32 % 4 * (wide * 8); }

  template <class PanelA, class PanelB>
  TCAM_DEVICE void add(const uint32_t* a_panel, const uint32_t* b_panel) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    a_panel += first_row() * PanelA::line_step + t * PanelA::k_step;
    b_panel += (first_column() + g) * PanelB::line_step + t * PanelB::k_step;
#pragma unroll
    for (int q = 0; q < depth; q += 8) {
      uint32_t a[tall][4], b[wide][2];
#pragma unroll
      for (int m = 0; m < tall; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          a[m][r] = a_panel[(m * 16 + r % 2 * 8) * PanelA::line_step + (q + r / 2 * 4) * PanelA::k_step];
#pragma unroll
      for (int n = 0; n < wide; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) b[n][r] = b_panel[n * 8 * PanelB::line_step + (q + r * 4) * PanelB::k_step];
#pragma unroll
      for (int m = 0; m < tall; ++m)
#pragma unroll
        for (int n = 0; n < wide; ++n) ptx::mma_tensor_float(sum[m][n], a[m], b[n]);
    }
  }

  static constexpr int groups = tall * wide * 2;
  TCAM_DEVICE static int row(int g) { return first_row() + g / 2 / wide * 16 + g % 2 * 8; }
  TCAM_DEVICE static int column(int g) { return first_column() + g / 2 % wide * 8 + threadIdx.x % 4 * 2; }
  TCAM_DEVICE const float* sums(int g) const { return sum[g / 2 / wide][g / 2 % wide] + g % 2 * 2; }
};

}  // namespace tcam
