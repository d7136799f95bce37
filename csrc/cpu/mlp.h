// The MLP above the maps on the CPU: packed weights, scratch memory and gradient sums around the voxel loop of voxel_core.cpp.
// The maps hold z_1 or, where planes are multiplied (grid_product.h), the features h_0, and layer 1 is the loop's second.
//
// The voxels of a piece (a slab of a grid, a wave of points) are cut into blocks. Each block has its own sums of the decoder's
// gradients, which are added up in block order at the end. The blocks depend on the problem alone, never on the number of
// threads, so each sum has one order: equal inputs give equal bits.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "../carver.h"
#include "../formulation.h"
#include "../maths/half.h"
#include "isa.h"
#include "parallel.h"

namespace tcam {

constexpr int forward_tile = 48, backward_tile = 96;  // voxels of a tile by default; measured: docs/performance.md

struct Range {  // lo <= index < hi
  long lo, hi;
};
// Chunk c of the range [0, n) cut into `chunks` nearly equal ones.
inline Range chunk(long n, long chunks, long c) { return {n * c / chunks, n * (c + 1) / chunks}; }

// The engine of a kind (0: float32, 1: float64, 2: bfloat16 products) for this machine's instruction set.
inline const Engine& pick_engine(int kind) {
  const Engine* e = instruction_set().engine(kind);
  return e ? *e : *instruction_set().engine(0);  // without bfloat16 instructions, float32 products, which round less
}

inline void zero(void* at, long bytes, int threads) {
  constexpr long piece = 1l << 20;
  parallel_for((bytes + piece - 1) / piece, threads,
               [&](long t, int) { std::memset(static_cast<char*>(at) + t * piece, 0, std::min(piece, bytes - t * piece)); });
}

template <class Real>
class Mlp {
 public:
  const tcam_problem& p;
  const Engine& core;  // computes the layers of the MLP
  const Engine& real;  // computes texels, maps and the first layer, in float32 or float64
  const bool backward;
  const long n1, stride, blocks;  // numbers of a map's row (0 without layers); the same padded; blocks of a piece
  const int threads;

  Mlp(const tcam_problem& problem, bool back, long block_count, Carver& ws)
      : p(problem),
        core(pick_engine(p.compute == TCAM_BF16 ? 2
                         : p.dtype == TCAM_F64  ? 1
                                                : 0)),
        real(pick_engine(p.dtype == TCAM_F64 ? 1 : 0)),
        backward(back),
        n1(p.layers ? map_width(p) : 0),
        stride(round_up(n1, real.columns)),
        blocks(block_count),
        threads(std::max(1, static_cast<int>(p.threads))),
        first_(multiplies_maps(p) ? 2 : 1),
        tile_(static_cast<int>(std::min<long>(round_up(p.tile > 0 ? p.tile
                                                       : back     ? backward_tile
                                                                  : forward_tile,
                                                       core.rows),
                                              max_tile))) {
    const int L = p.layers + first_ - 1;
    decoder_.layers = L;
    decoder_.width[1] = n1;
    decoder_.activation[1] = {Activation::leaky_relu, 1};  // the identity
    for (int l = first_; l < L; ++l) {
      const tcam_activation& a = p.activation[l - first_];
      decoder_.activation[l] = {static_cast<Activation>(a.kind), a.parameter};
    }
    decoder_.output_activation = {static_cast<OutputActivation>(p.output_activation.kind), p.output_activation.parameter};
    for (int l = first_; l <= L; ++l) decoder_.width[l] = p.width[l - first_ + 1], decoder_.skip[l] = p.skip[l - first_ + 1];
    decoder_.first_width = n1;
    for (int l = 2; l <= L; ++l) {
      const long in = decoder_.width[l - 1], out = decoder_.width[l];
      if (in_panels(l)) decoder_.forward[l] = ws.take(panel_words(in) * round_up(out, core.columns) * core.word_bytes);
      decoder_.bias[l] = ws.take(round_up(out, core.columns) * core.real_bytes);
      if (backward) decoder_.transposed[l] = ws.take(panel_words(out) * round_up(in, core.columns) * core.word_bytes);
    }
    if (L > 1 && !in_panels(L)) decoder_.last = ws.take(decoder_.width[L] * last_stride() * core.word_bytes);
    losses_ = reinterpret_cast<double*>(ws.take(blocks * static_cast<long>(sizeof(double))));
    const long each = std::max(core.scratch_bytes(decoder_, backward), real.scratch_bytes(decoder_, backward));
    for (int t = 0; t < threads; ++t) scratch_.push_back(ws.take(each));
    if (!backward || !p.grad_decoder) return;
    for (int l = 2; l <= L; ++l) {
      decoder_.grad_offset[l] = block_sums_;
      block_sums_ += round_up(decoder_.width[l], core.rows) * round_up(decoder_.width[l - 1], core.columns);
      decoder_.grad_bias_offset[l] = block_sums_;
      block_sums_ += round_up(decoder_.width[l], core.columns);
    }
    block_sums_ = round_up(block_sums_, 16);
    sums_ = reinterpret_cast<Real*>(ws.take(blocks * block_sums_ * core.real_bytes));
  }

  long row_bytes(long rows) const { return rows * stride * real.real_bytes; }  // bytes of rows of `stride` reals
  char* scratch(int thread) const { return scratch_[static_cast<size_t>(thread)]; }

  // Packs the weights and biases of the voxel loop's layers from the second on.
  void pack(const tcam_inputs& in) {
    const int L = decoder_.layers;
    for (int l = 2; l <= L; ++l) {
      const long m = decoder_.width[l - 1], n = decoder_.width[l];
      const void* weights = in.weights[l - first_];
      if (in_panels(l)) core.pack_panels(weights, 1, m, m, n, const_cast<void*>(decoder_.forward[l]));
      if (backward) core.pack_panels(weights, m, 1, n, m, const_cast<void*>(decoder_.transposed[l]));
      copy_bias(const_cast<void*>(decoder_.bias[l]), in.biases[l - first_], n, round_up(n, core.columns));
    }
    if (decoder_.last)
      core.pack_rows(in.weights[L - first_], decoder_.width[L], decoder_.width[L - 1], const_cast<void*>(decoder_.last),
                     last_stride());
  }
  static void copy_bias(void* dst, const void* bias, long n, long padded) {
    std::memset(dst, 0, static_cast<size_t>(padded) * sizeof(Real));
    if (bias) std::memcpy(dst, bias, static_cast<size_t>(n) * sizeof(Real));
  }

  void clear_losses() { zero(losses_, blocks * static_cast<long>(sizeof(double)), 1); }
  void clear_gradients() {
    if (sums_) zero(sums_, blocks * block_sums_ * core.real_bytes, threads);
  }
  double total_loss() const {
    double sum = 0;
    for (long q = 0; q < blocks; ++q) sum += losses_[q];
    return sum;
  }

  // Runs the voxel loop over block number `task` on one thread, and writes the output to `volume`. With an objective, `volume`
  // is the target instead, and the losses are added to those of the block.
  void forward_block(const Maps& maps, const Block& block, const Volume& volume, const tcam_objective* objective, long task,
                     int thread) const {
    const Comparison compare = comparison_of(objective, task);
    core.forward(decoder_, maps, block, volume, objective ? &compare : nullptr, tile_, scratch(thread));
  }
  // The same for gradients: `volume` is the gradient of the output or, with an objective, the target. Adds to `grads` and to
  // the block's sums of the decoder's gradients.
  void backward_block(const Maps& maps, const Block& block, const Volume& volume, const tcam_objective* objective,
                      BlockGradients grads, long task, int thread) const {
    const Comparison compare = comparison_of(objective, task);
    grads.decoder = sums_ ? sums_ + task * block_sums_ : nullptr;
    core.backward(decoder_, maps, block, volume, objective ? &compare : nullptr, grads, tile_, scratch(thread));
  }

  // Adds up the blocks' gradients of the same layers, in block order, and writes them to row `object` of `to`.
  void write_gradients(const tcam_gradients& to, long object) const {
    for (int l = 2; l <= decoder_.layers; ++l) {
      const long in = decoder_.width[l - 1], out = decoder_.width[l], padded = round_up(in, core.columns);
      Real* weight = static_cast<Real*>(to.weights[l - first_]) + object * out * in;
      Real* bias = to.biases[l - first_] ? static_cast<Real*>(to.biases[l - first_]) + object * out : nullptr;
      parallel_for(out, threads, [&](long r, int) {
        for (long x = 0; x < in; ++x) {
          Real sum = 0;
          for (long q = 0; q < blocks; ++q) sum += sums_[q * block_sums_ + decoder_.grad_offset[l] + r * padded + x];
          weight[r * in + x] = sum;
        }
        if (bias) {
          Real sum = 0;
          for (long q = 0; q < blocks; ++q) sum += sums_[q * block_sums_ + decoder_.grad_bias_offset[l] + r];
          bias[r] = sum;
        }
      });
    }
  }

 private:
  int first_;  // the layer of the voxel loop that is the decoder's first: 2 if the loop also multiplies W_1
  int tile_;
  Decoder decoder_{};
  long block_sums_ = 0;         // reals of a block's sums of decoder gradients
  Real* sums_ = nullptr;        // (blocks, block_sums_); null: not wanted
  double* losses_;              // (blocks)
  std::vector<char*> scratch_;  // one for each thread

  // Whether the product of layer l, 2 or more, is in register blocks.
  bool in_panels(int l) const { return l < decoder_.layers || decoder_.width[l] >= wide_output; }
  long words(long reals) const { return (reals + core.pack - 1) / core.pack; }
  long panel_words(long reals) const { return round_up(words(reals), core.group); }
  long last_stride() const {  // words of a row of the last layer
    return round_up(words(decoder_.width[decoder_.layers - 1]), core.columns / 2);
  }
  Comparison comparison_of(const tcam_objective* o, long task) const {
    if (!o) return {};
    return {static_cast<Loss>(o->loss), o->beta, losses_ + task};
  }
};

}  // namespace tcam
