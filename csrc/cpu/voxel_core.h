// Engine: the functions that each instruction set provides to mlp.h, grid.h and points.h, over raw pointers. Matrices of reals
// (float or double, by engine) are row-major. Widths are padded with zeros to a multiple of `columns`.
#pragma once
#include "../maths/activation.h"
#include "../maths/loss.h"
#include "../maths/noise.h"
#include "../problem.h"

namespace tcam {

constexpr int max_tile = 96;                     // most voxels (rows) of a tile; a multiple of every engine's `rows`
constexpr int max_layers = TCAM_MAX_LAYERS + 1;  // of the voxel loop: one more where it multiplies W_1 (mlp.h)
constexpr int max_out = TCAM_MAX_OUT;
constexpr int wide_output = 4;  // outputs from which the last layer is a product in register blocks, not of single rows

constexpr long round_up(long n, long to) { return (n + to - 1) / to * to; }

// The decoder as the voxel loop reads it. Layer l in 1..layers has width[l] outputs. Layer 1 is part of the maps, so the arrays
// below start at index 2.
struct Decoder {
  int layers;
  long width[max_layers + 1];
  long first_width, skip[max_layers + 1];     // numbers of a row of the maps; the column in it of a layer that reads it too
  Hidden<double> activation[max_layers + 1];  // of layers 1 to layers-1
  Final<double> output_activation;
  const void* forward[max_layers + 1];     // packed words, width[l-1] -> width[l]; l = 2..layers-1, and layers if it is wide
  const void* transposed[max_layers + 1];  // packed words, width[l] -> width[l-1]; backward only, l = 2..layers
  const void* bias[max_layers + 1];        // reals, padded to `columns`
  const void* last;                        // words (width[layers], padded width[layers-1]): the last layer by rows, if narrow
  long grad_offset[max_layers + 1];        // in a block's gradient sums: (round_up(n_l, rows), padded n_{l-1})
  long grad_bias_offset[max_layers + 1];
};

// The maps of a slab of i, rows of `stride` reals. z_1 of voxel (i, j, k) is a[i, j] + b[j, k] + g[i, k] or, with `multiply`,
// a[i, j] * b[j, k] * g[i, k]; sums have the parts of higher layers that read the features too. Steps between rows are in
// reals, and 0 where all voxels share a row. Points are a grid (1, points, 1) with their z_1 in a.
struct Maps {
  const void *a, *b, *g;
  long a_i, a_j, b_j, b_k, g_i, g_k;
  long wide, deep, stride;
  const int32_t* order;  // the point that each row of a belongs to; null: in order
  bool multiply;
};

// The part of a slab that one thread walks: k fastest, then j, then i.
struct Block {
  long i0, i1, j0, j1, k0, k1;
};

// One object's volume (C_out, H, W, D) or (points, C_out), its gradient, or a target. `offset` is that of the first voxel.
struct Volume {
  void* data;
  int dtype;
  long channel_stride, voxel_stride, offset;
  __attribute__((always_inline)) long index(long channel, long voxel) const {
    return channel * channel_stride + (offset + voxel) * voxel_stride;
  }
};

// The loss that compares the decoded volume with a target, instead of writing the volume or reading its gradient.
struct Comparison {
  Loss loss;
  double beta;
  double* sum;  // the block's sum, to which the losses of its voxels are added
};

// The sums that backward adds to, laid out like Maps. No two threads share one: da belongs to the block's range of k, dg to its
// range of j, db and decoder to the block.
struct BlockGradients {
  void *da, *db, *dg;  // null: not wanted
  void* decoder;       // null: the decoder is frozen
};

// Features of reals, with element (s, c) at data[s * row_stride + c * channel_stride].
struct Features {
  const void* data;
  long channels, row_stride, channel_stride;
};

// The texel rows that points read. Tap q of point t is the row at[t * pitch + q] (in reals) with weights[t * pitch + q].
struct PointTaps {
  const int64_t* at;
  const void* weights;
  long pitch, taps;
};

struct Engine {
  int rows, columns;  // of the register tile
  int pack;           // reals per word
  int group;          // words that a product contracts at once; panels are padded with zeros to a multiple
  int word_bytes, real_bytes;

  // Packs a K x N matrix with element (k, n) at src[k*k_stride + n*n_stride] into panels [n/columns][word of k][columns], with
  // a multiple of `group` words of k.
  void (*pack_panels)(const void* src, long k_stride, long n_stride, long k, long n, void* dst);
  void (*pack_rows)(const void* src, long rows, long n, void* dst, long dst_stride);

  long (*scratch_bytes)(const Decoder&, bool backward);
  // Decode a block. With a comparison (null: none), `volume` is the target; else forward writes it and backward reads its
  // gradient from it.
  void (*forward)(const Decoder&, const Maps&, const Block&, const Volume& volume, const Comparison*, int tile, void* scratch);
  void (*backward)(const Decoder&, const Maps&, const Block&, const Volume& volume, const Comparison*, const BlockGradients&,
                   int tile, void* scratch);

  // The remaining functions use real arithmetic and exist in engines with pack == 1 only.
  // out[s, :n] = W features[s] (with add: +=) for s in [s0, s1), with weights packed channels -> n.
  void (*project)(const Features& features, long s0, long s1, const void* weights, long n, void* out, long stride, bool add,
                  void* scratch);
  // grad_features[s] = W^T grad[s, :n], with weights packed n -> channels (null: not wanted), and grad_weights (round_up(n,
  // rows), padded channels) += grad^T features (null: not wanted).
  void (*unproject)(const void* grad, long stride, const Features& features, long s0, long s1, const void* weights, long n,
                    void* grad_features, void* grad_weights, void* scratch);

  // gather: out[t, :n] = bias (null: 0) + the weighted sum of the taps' rows. scatter: the taps' rows += weights * delta[t] in
  // channels [c0, c1). dot: dots[t * pitch + tap] = <delta[t], the tap's row>. n, c0 and c1 are multiples of a vector.
  void (*gather)(const void* texels, const PointTaps& taps, long count, const void* bias, void* out, long out_stride, long n);
  void (*scatter)(void* texels, const PointTaps& taps, long count, const void* delta, long delta_stride, long c0, long c1);
  void (*dot)(const void* texels, const PointTaps& taps, long count, const void* delta, long delta_stride, long n, void* dots);

  // dst = sum of w[t] * src[t] over 4 taps, plus bias (null: none), for `stride` reals.
  void (*bilinear_row)(const void* const src[4], const double w[4], const void* bias, void* dst, long stride);
  void (*add_scaled)(void* dst, const void* src, double w, long n);  // dst += w src

  // The normals of a key's Philox blocks [b0, b1), written to their places in out (count); see maths/noise.h.
  void (*normals)(const NoiseKey&, long count, long b0, long b1, float* out);
  // Philox4x32-10 of one counter, in place.
  void (*philox)(uint32_t counter[4], uint32_t k0, uint32_t k1);

  // Multiplies and adds in registers alone and returns the FLOP done, which the caller divides by the time.
  double (*spin)(long iterations, void* sink);
};

// engine(kind) of each set: 0 float32, 1 float64, 2 bfloat16 products (null without instructions for them).
#define TCAM_DECLARE_ENGINES(isa) \
  namespace isa {                 \
  const Engine* engine(int kind); \
  }
TCAM_DECLARE_ENGINES(portable)
TCAM_DECLARE_ENGINES(avx2)
TCAM_DECLARE_ENGINES(avx512)
TCAM_DECLARE_ENGINES(avx512bf16)
TCAM_DECLARE_ENGINES(amx)
TCAM_DECLARE_ENGINES(emulated)  // the avx512bf16 or amx code in ordinary arithmetic, which only the tests build
#undef TCAM_DECLARE_ENGINES

}  // namespace tcam
