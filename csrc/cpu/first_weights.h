// The weights of the first layer on the CPU and the sums of their gradients, for grids and points alike.
#pragma once
#include "mlp.h"

namespace tcam {

// W_1 as blocks of columns, one for each matrix of features that it multiplies: those of a group of planes; then the extra
// features, TCAM_MAX_WIDTH at a time. Each block has `chunks` partial sums of its gradient, the bias has `bias_rows`; a caller
// adds to a chunk or row from one thread at a time, in a fixed order.
template <class Real>
class FirstWeights {
 public:
  const long chunks;

  FirstWeights(const Mlp<Real>& mlp, long chunk_count, long bias_rows, Carver& ws)
      : chunks(chunk_count), m(mlp), p(mlp.p), bias_rows_(bias_rows) {
    for (int g = 0; g < p.group_count; ++g) add(ws, p.channels);
    for (long e = 0; e < p.extra; e += TCAM_MAX_WIDTH) add(ws, std::min<long>(p.extra - e, TCAM_MAX_WIDTH));
    bias_ = ws.take(m.row_bytes(1));
    if (m.backward && p.layers) bias_sums_ = ws.array<Real>(bias_rows * m.stride);
  }

  long blocks() const { return static_cast<long>(blocks_.size()); }
  long block_of(long plane) const { return p.planes[plane].group; }
  long width(long b) const { return blocks_[static_cast<size_t>(b)].width; }
  const void* weights(long b) const { return blocks_[static_cast<size_t>(b)].packed; }
  const void* transposed(long b) const { return blocks_[static_cast<size_t>(b)].transposed; }
  const void* bias() const { return bias_; }
  // Partial sum `chunk` of block b's gradient: (round_up(n_1, rows), padded width); null: not wanted.
  void* partial(long b, long chunk) const {
    const Part& part = blocks_[static_cast<size_t>(b)];
    return part.partials ? part.partials + chunk * part_size(part.width) : nullptr;
  }
  // Adds delta (n_1 padded), a gradient of z_1, to partial sum `row` of the bias's gradient.
  void add_bias_gradient(long row, const Real* delta) const {
    m.real.add_scaled(bias_sums_ + row * m.stride, delta, 1.0, m.stride);
  }

  void pack(const tcam_inputs& in) {
    if (!p.layers) return;
    const Real* w1 = static_cast<const Real*>(in.weights[0]);
    for (const Part& b : blocks_) {
      m.real.pack_panels(w1 + b.column, 1, p.width[0], b.width, m.n1, b.packed);
      if (m.backward) m.real.pack_panels(w1 + b.column, p.width[0], 1, m.n1, b.width, b.transposed);
    }
    Mlp<Real>::copy_bias(bias_, in.biases[0], m.n1, m.stride);
  }
  void clear_gradients() {
    for (const Part& b : blocks_)
      if (b.partials) zero(b.partials, chunks * part_size(b.width) * m.real.real_bytes, m.threads);
    if (bias_sums_) zero(bias_sums_, m.row_bytes(bias_rows_), m.threads);
  }
  // Adds up the partial sums, chunks and rows in ascending order, and writes them to row `object` of `to`.
  void write_gradients(const tcam_gradients& to, long object) const {
    Real* weight = static_cast<Real*>(to.weights[0]) + object * m.n1 * p.width[0];
    for (const Part& b : blocks_) {
      const long padded = round_up(b.width, m.real.columns), size = part_size(b.width);
      parallel_for(m.n1, m.threads, [&](long r, int) {
        for (long x = 0; x < b.width; ++x) {
          Real sum = 0;
          for (long c = 0; c < chunks; ++c) sum += b.partials[c * size + r * padded + x];
          weight[r * p.width[0] + b.column + x] = sum;
        }
      });
    }
    if (!to.biases[0]) return;
    Real* bias = static_cast<Real*>(to.biases[0]) + object * m.n1;
    for (long r = 0; r < m.n1; ++r) {
      bias[r] = 0;
      for (long row = 0; row < bias_rows_; ++row) bias[r] += bias_sums_[row * m.stride + r];
    }
  }

 private:
  // A block of columns: its width, its first column in W_1, its packed weights, and its partial sums.
  struct Part {
    long width, column;
    void *packed, *transposed;
    Real* partials;
  };
  const Mlp<Real>& m;
  const tcam_problem& p;
  const long bias_rows_;
  std::vector<Part> blocks_;
  char* bias_;
  Real* bias_sums_ = nullptr;

  long part_size(long width) const { return round_up(m.n1, m.real.rows) * round_up(width, m.real.columns); }
  void add(Carver& ws, long width) {
    Part b = {width, blocks_.empty() ? 0 : blocks_.back().column + blocks_.back().width, nullptr, nullptr, nullptr};
    const long bytes = m.real.real_bytes;
    if (p.layers) {
      b.packed = ws.take(width * m.stride * bytes);
      if (m.backward) b.transposed = ws.take(m.n1 * round_up(width, m.real.columns) * bytes);
      if (m.backward && p.grad_decoder) b.partials = ws.array<Real>(chunks * part_size(width));
    }
    blocks_.push_back(b);
  }
};

}  // namespace tcam
