// The small kernels around the fused ones: they pad and round weights, convert rows of points, and compute the gradients of the
// top layers.
#pragma once
#include "fused_tile.cuh"
#include "scale.cuh"

namespace tcam {

// ---- weights --------------------------------------------------------------------------------

// to_weight (padded_rows, padded) = round(weight (rows, columns)) and to_bias (padded_rows) = bias (rows), with zeros in the
// padding. Where row_factors (rows) is not null, row r is first multiplied by row_factors[r] * *scale; a null scale is 1. A
// null bias is zero; a null to_bias is not written. Where `transposed`, which needs padded_rows = padded, to_weight is the
// transpose. A thread owns an element.
template <class Out, class Round>
TCAM_DEVICE void pad_matrix(const float* weight, const float* row_factors, const float* scale, const float* bias, int rows,
                            int columns, int padded_rows, int padded, bool transposed, Out* to_weight, float* to_bias,
                            Round round) {
  for (int e = blockIdx.x * threads + threadIdx.x; e < padded_rows * padded; e += gridDim.x * threads) {
    const int r = e / padded, c = e % padded;
    const float w = r < rows && c < columns ? weight[static_cast<int64_t>(r) * columns + c] : 0.f;
    to_weight[transposed ? c * padded + r : e] =
        round(row_factors && r < rows ? w * (row_factors[r] * (scale ? *scale : 1.f)) : w);
    if (c == 0 && to_bias) to_bias[r] = bias && r < rows ? bias[r] : 0.f;
  }
}
// pad_matrix of a hidden layer, square and in the 16-bit format T; and of the last layer, in float32 with its rows unpadded.
template <class T>
__global__ void __launch_bounds__(threads)
    pad_hidden_kernel(const float* weight, const float* row_factors, const float* scale, const float* bias, int rows,
                      int columns, int padded, bool transposed, uint16_t* to_weight, float* to_bias) {
  pad_matrix(weight, row_factors, scale, bias, rows, columns, padded, padded, transposed, to_weight, to_bias,
             [](float x) { return T::round(x); });
}
static __global__ void __launch_bounds__(threads) pad_last_kernel(const float* weight, const float* bias, int rows, int columns,
                                                                  int padded, float* to_weight, float* to_bias) {
  pad_matrix(weight, nullptr, nullptr, bias, rows, columns, rows, padded, false, to_weight, to_bias, [](float x) { return x; });
}

// ---- rows of points ---------------------------------------------------------------------------

// rows (count, padded) = z (count, n) rounded to T, with zeros in the padding. A thread owns an element.
template <class T>
__global__ void __launch_bounds__(threads) round_rows_kernel(const float* z, int64_t count, int n, int padded, uint16_t* rows) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count * padded;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t t = e / padded, c = e % padded;
    rows[e] = T::round(c < n ? z[t * n + c] : 0.f);
  }
}
// delta (count, n) = rows (count, padded) times *factor (null: 1). The channels of a row are in the order of delta1_column.
template <class T>
__global__ void __launch_bounds__(threads)
    widen_rows_kernel(const uint16_t* rows, int64_t count, int n, int padded, const float* factor, float* delta) {
  const float f = factor ? *factor : 1.f;
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count * padded;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t t = e / padded;
    const int c = delta1_column(static_cast<int>(e % padded));
    if (c < n) delta[t * n + c] = T::widen(rows[e]) * f;
  }
}

// out (count, channels) of `dtype` = planar (channels, count), transposed. A thread owns an element.
static __global__ void __launch_bounds__(threads)
    interleave_kernel(const float* planar, int64_t count, int channels, void* out, int dtype) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count * channels;
       e += static_cast<int64_t>(gridDim.x) * threads)
    Elements<float>::write(out, dtype, e, planar[e % channels * count + e / channels]);
}

// ---- the gradients of the layers at the top -------------------------------------------------------

// Arguments of combine_top_kernel. w is the weight row of the last layer's single output.
struct TopLayers {
  Partials<float> sums, row_sums;  // partial sums of dW_(P+1) (rows, columns) and db_(P+1) (rows) without the factors w_r
  const uint16_t* weight;          // W_(P+1) in the kernel's 16-bit format, `pitch` numbers from row to row
  const float *bias, *last;        // (rows): b_(P+1); w
  int pitch, columns;
  const float* factor;                         // multiplies all gradients, undoing float16's scale; null: 1
  float *grad_weight, *grad_bias, *grad_last;  // (rows, columns); (rows) or null; (rows)
};

// The gradients of the top two layers of a decoder with one output. With S_r and s_r the sums over splits, in ascending order:
// dW_r = w_r S_r, db_r = w_r s_r, and dw_r = sum over voxels of dy h_r = W_r . S_r + b_r s_r, because
// h_r = mask_r (W_r h + b_r). So no launch for the last layer is needed. A block owns a row r.
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

// *out = *value times *factor (null: 1). One thread.
static __global__ void write_scalar_kernel(const double* value, const float* factor, float* out) {
  *out = static_cast<float>(*value * (factor ? static_cast<double>(*factor) : 1.));
}

}  // namespace tcam
