// What one instruction set offers to the orchestration in mlp.h, grid.h and points.h: a table of
// functions over raw pointers. All matrices of reals are row-major; `real` is float or
// double as the table says; widths are padded with zeros to a multiple of `columns`.
#pragma once
#include "../maths/activation.h"
#include "../maths/loss.h"
#include "../maths/noise.h"
#include "../problem.h"

namespace tcam {

constexpr int max_tile = 96;  // voxels (rows) a tile, at most; a multiple of every `rows`
constexpr int max_layers = TCAM_MAX_LAYERS;
constexpr int max_out = TCAM_MAX_OUT;

inline long round_up(long n, long to) { return (n + to - 1) / to * to; }

// The decoder as the voxel loop reads it. Layer l of 1..layers has width[l] outputs; layer 1
// is inside the maps, so the arrays below start at layer 2 (index 2).
struct Decoder {
  int layers;
  long width[max_layers + 1];
  Hidden<double> activation[max_layers + 1];  // of layers 1 to layers-1
  Final<double> output_activation;
  const void* forward[max_layers + 1];     // packed words, width[l-1] -> width[l]; l = 2..layers-1
  const void* transposed[max_layers + 1];  // packed words, width[l] -> width[l-1]; backward only, l = 2..layers
  const void* bias[max_layers + 1];        // reals, padded to `columns`
  const void* last;                        // words (width[layers], padded width[layers-1]): the last layer by rows
  long grad_offset[max_layers + 1];        // into a block's gradient sums: (round_up(n_l, rows), padded n_{l-1})
  long grad_bias_offset[max_layers + 1];
};

// z_1 of voxel (i, j, k) = a[i, j] + b[j, k] + g[i, k], rows of `stride` reals; the steps between rows are in reals, and 0
// where all share one. Of a grid: one slab of i; of points: (1, points, 1) with their z_1 in a.
struct Maps {
  const void *a, *b, *g;
  long a_i, a_j, b_j, b_k, g_i, g_k;
  long wide, deep, stride;
  const int32_t* order;  // of points: which of the volume's a row of a is; null: in order
};

// Part of a slab that one thread walks, k fastest, then j, then i.
struct Block {
  long i0, i1, j0, j1, k0, k1;
};

// The volume (C_out, H, W, D) of one object or (points, C_out), its gradient, or a target. `offset` is the first voxel's.
struct Volume {
  void* data;
  int dtype;
  long channel_stride, voxel_stride, offset;
  __attribute__((always_inline)) long index(long channel, long voxel) const {
    return channel * channel_stride + (offset + voxel) * voxel_stride;
  }
};

// Compare the decoded volume with a target instead of writing it, or instead of reading its gradient.
struct Objective {
  Loss loss;
  double beta;
  double* sum;  // of the block: the losses of its voxels are added
};

// What backward adds to, laid out as Maps. da belongs to the block's range of k, dg to its range of j, db and decoder to the
// block alone: no two threads share a sum.
struct BlockGradients {
  void *da, *db, *dg;  // null: not wanted
  void* decoder;       // null: the decoder is frozen
};

// Element (s, c) at data[s * row_stride + c * channel_stride], reals.
struct Features {
  const void* data;
  long channels, row_stride, channel_stride;
};

// The texel rows that points read: of point t, at[t * pitch + tap] (in reals) for `taps` taps, with weights (reals).
struct PointTaps {
  const int64_t* at;
  const void* weights;
  long pitch, taps;
};

struct Engine {
  int rows, columns;  // of the register tile
  int pack;           // reals a word
  int word_bytes, real_bytes;

  // K x N matrix with element (k, n) at src[k*k_stride + n*n_stride] into panels [n/columns][word of k][columns].
  void (*pack_panels)(const void* src, long k_stride, long n_stride, long k, long n, void* dst);
  void (*pack_rows)(const void* src, long rows, long n, void* dst, long dst_stride);

  long (*scratch_bytes)(const Decoder&, bool backward);
  // With an objective (null: none), `volume` is the target; otherwise forward writes it, and backward reads the gradient in it.
  void (*forward)(const Decoder&, const Maps&, const Block&, const Volume& volume, const Objective*, int tile, void* scratch);
  void (*backward)(const Decoder&, const Maps&, const Block&, const Volume& volume, const Objective*, const BlockGradients&,
                   int tile, void* scratch);

  // Products of feature rows, real arithmetic (pack == 1 engines only).
  // out[s, :n] = (add: +=) W features[s] for s in [s0, s1); weights packed channels -> n.
  void (*project)(const Features& features, long s0, long s1, const void* weights, long n, void* out, long stride, bool add,
                  void* scratch);
  // grad_features[s] = W^T grad[s, :n] (weights packed n -> channels; null: not wanted) and
  // grad_weights (round_up(n, rows), padded channels) += grad^T features (null: not wanted).
  void (*unproject)(const void* grad, long stride, const Features& features, long s0, long s1, const void* weights, long n,
                    void* grad_features, void* grad_weights, void* scratch);

  // out[t, :n] = bias (null: 0) + sum of the taps' rows; scatter adds [c0, c1) of delta[t] times the weights to the rows; dot
  // puts <delta[t], row> of each tap at dots[t * pitch + tap]. n, c0, c1: multiples of a vector.
  void (*gather)(const void* texels, const PointTaps& taps, long count, const void* bias, void* out, long out_stride, long n);
  void (*scatter)(void* texels, const PointTaps& taps, long count, const void* delta, long delta_stride, long c0, long c1);
  void (*dot)(const void* texels, const PointTaps& taps, long count, const void* delta, long delta_stride, long n, void* dots);

  // dst = sum over 4 taps of w[t] * src[t], plus bias (null: none); `stride` reals.
  void (*bilinear_row)(const void* const src[4], const double w[4], const void* bias, void* dst, long stride);
  void (*add_scaled)(void* dst, const void* src, double w, long n);  // dst += w src

  // Of a key's `count` normals (maths/noise.h) those of its Philox blocks [b0, b1), to their places in out (count).
  void (*normals)(const NoiseKey&, long count, long b0, long b1, float* out);
  // Of one counter, in place.
  void (*philox)(uint32_t counter[4], uint32_t k0, uint32_t k1);

  // Sustained multiply-adds of registers alone, in FLOP; the benchmark divides by its time.
  double (*spin)(long iterations, void* sink);
};

// engine(0) float32, engine(1) float64, engine(2) bfloat16 products or null.
#define TCAM_DECLARE_ENGINES(isa) \
  namespace isa {                 \
  const Engine* engine(int kind); \
  }
TCAM_DECLARE_ENGINES(portable)
TCAM_DECLARE_ENGINES(avx2)
TCAM_DECLARE_ENGINES(avx512)
TCAM_DECLARE_ENGINES(avx512bf16)
TCAM_DECLARE_ENGINES(emulated)  // the avx512bf16 text in ordinary arithmetic; built by the tests alone
#undef TCAM_DECLARE_ENGINES

}  // namespace tcam
