// What one instruction set offers to the orchestration in decode_grid.cpp: a table of
// functions over raw pointers. All matrices of reals are row-major; `real` is float or
// double as the table says; widths are padded with zeros to a multiple of `columns`.
#pragma once
#include "../maths/activation.h"
#include "../maths/loss.h"

namespace tcam {

constexpr int max_tile = 96;  // voxels (rows) a tile, at most; a multiple of every `rows`
constexpr int max_layers = 6;
constexpr int max_out = 16;

inline long round_up(long n, long to) { return (n + to - 1) / to * to; }

// The decoder as the voxel loop reads it. Layer l of 1..layers has width[l] outputs; layer 1
// is inside the maps, so the arrays below start at layer 2 (index 2).
struct Decoder {
  int layers;
  long width[max_layers + 1];
  Activation activation;
  OutputActivation output_activation;
  const void* forward[max_layers + 1];     // packed words, width[l-1] -> width[l]; l = 2..layers-1
  const void* transposed[max_layers + 1];  // packed words, width[l] -> width[l-1]; backward only, l = 2..layers
  const void* bias[max_layers + 1];        // reals, padded to `columns`
  const void* last;                        // words (width[layers], padded width[layers-1]): the last layer by rows
  long grad_offset[max_layers + 1];        // into a block's gradient sums: (round_up(n_l, rows), padded n_{l-1})
  long grad_bias_offset[max_layers + 1];
};

// One slab of i: a (slab, W, stride), b (W, D, stride), g (slab, D, stride), reals; h_1 = act(a + b + g).
struct Maps {
  const void *a, *b, *g;
  long wide, deep, stride;
};

// Part of a slab that one thread walks, k fastest, then j, then i.
struct Block {
  long i0, i1, j0, j1, k0, k1;
};

// The volume (C_out, H, W, D) of one object, its gradient, or a target. `offset` is the slab's first voxel.
struct Volume {
  void* data;
  int dtype;
  long channel_stride, offset;
};

// Compare the decoded volume with a target instead of writing it, or instead of reading its gradient.
struct Objective {
  Loss loss;
  double beta;
  double* sum;  // of the block: the losses of its voxels are added
};

// What backward adds to. da (slab, W, stride) belongs to the block's range of k, dg (slab, D, stride)
// to its range of j, db (W, D, stride) and decoder to the block alone: no two threads share a sum.
struct BlockGradients {
  void *da, *db, *dg;
  void* decoder;  // null: the decoder is frozen
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

  // Per texel products, real arithmetic (pack == 1 engines only). plane is (C, texels).
  // out[s, :n] = W plane[:, s] for s in [s0, s1); weights packed C -> n.
  void (*project)(const void* plane, long channels, long texels, long s0, long s1, const void* weights, long n, void* out,
                  long stride, void* scratch);
  // grad_plane[:, s] = W^T grad[s, :n] (weights packed n -> C; null: not wanted) and
  // grad_weights (round_up(n, rows), padded C) += grad^T plane (null: not wanted).
  void (*unproject)(const void* grad, long stride, const void* plane, long channels, long texels, long s0, long s1,
                    const void* weights, long n, void* grad_plane, void* grad_weights, void* scratch);

  // dst[r, :] = sum over 4 taps of w[t] * src[t][r, :], plus bias (null: none); `stride` reals.
  void (*bilinear_row)(const void* const src[4], const double w[4], const void* bias, void* dst, long stride);
  void (*add_scaled)(void* dst, const void* src, double w, long n);  // dst += w src

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
