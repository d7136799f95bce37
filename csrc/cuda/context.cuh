// The state that a Decode's first layer and MLP share during a call: the problem, the stream, the first CUDA error, pointers to
// the decoder's weights and gradients; and short forms of the kernel launches that both use.
#pragma once
#include <stdio.h>

#include "../carver.h"
#include "gemm.cuh"
#include "sums.cuh"

namespace tcam {

constexpr int64_t region_voxels = 65536, region_bytes = 256ll << 20;
constexpr int64_t voxel_chunk = 256;  // voxels in one partial sum of a weight or bias gradient
constexpr int64_t texel_splits = 32;  // partial sums of a weight gradient over a plane's texels

enum class Output { volume, losses, gradients };

// The output array of a round (one object of a grid, or all points). Forward writes it, backward reads the gradient of the
// output from it; with an objective both read the target from it. Strides count elements of `dtype`.
struct Volume {
  void* data;
  int dtype;
  int64_t channel_stride, voxel_stride;
};

template <class Real>
class Context {
 public:
  const tcam_problem& p;
  const bool backward;
  const cudaStream_t stream;
  // Entry l belongs to layer l >= 1: weights (width[l], width[l-1]), biases (width[l]) or null; with first_width rows for l
  // = 1.
  const Real *weights[TCAM_MAX_LAYERS + 1] = {}, *biases[TCAM_MAX_LAYERS + 1] = {};
  Real *grad_weights[TCAM_MAX_LAYERS + 1] = {}, *grad_biases[TCAM_MAX_LAYERS + 1] = {};

  Context(const tcam_problem& problem, bool goes_back, cudaStream_t on) : p(problem), backward(goes_back), stream(on) {}

  cudaError_t status() const { return status_; }
  int width(int layer) const { return static_cast<int>(p.width[layer]); }
  int first_width() const { return static_cast<int>(p.first_width); }
  Hidden<Real> activation(int layer) const {  // layer 1 to L-1; layer 0 gives an arbitrary one, which is not used
    const tcam_activation& a = p.activation[layer > 0 ? layer - 1 : 0];
    return {static_cast<Activation>(a.kind), static_cast<Real>(a.parameter)};
  }
  Final<Real> output_activation() const {
    return {static_cast<OutputActivation>(p.output_activation.kind), static_cast<Real>(p.output_activation.parameter)};
  }
  // Whether products over voxels run on tensor cores in TensorFloat-32. Products over texels never do.
  bool tensor_floats() const { return sizeof(Real) == sizeof(float) && p.compute != TCAM_F32; }

  void set_layers(const tcam_inputs& in) {
    for (int l = 1; l <= p.layers; ++l) {
      weights[l] = static_cast<const Real*>(in.weights[l - 1]);
      biases[l] = static_cast<const Real*>(in.biases[l - 1]);
    }
  }
  // The pointers to the decoder's gradients. `row` is the object where the gradients have a leading axis B, else 0.
  void set_gradients(const tcam_gradients& to, int64_t row) {
    for (int l = 1; l <= p.layers; ++l) {
      Real* bias = static_cast<Real*>(to.biases[l - 1]);
      const int64_t n = l == 1 ? p.first_width : p.width[l];
      grad_weights[l] = static_cast<Real*>(to.weights[l - 1]) + row * n * p.width[l - 1];
      grad_biases[l] = bias ? bias + row * n : nullptr;
    }
  }

  void check(cudaError_t status) {
    if (status_ == cudaSuccess) status_ = status;
  }
  void clear(void* at, int64_t bytes) {
    if (bytes) check(cudaMemsetAsync(at, 0, static_cast<size_t>(bytes), stream));
  }

  // The grid size of a kernel whose blocks stride over `wanted` blocks of work.
  static unsigned blocks(int64_t wanted) { return static_cast<unsigned>(wanted < 1 ? 1 : wanted < 65535 ? wanted : 65535); }
  static unsigned channel_threads(int n) { return n > 128 ? 256 : n > 64 ? 128 : n > 32 ? 64 : 32; }

  template <class... P, class... A>
  void run(void (*kernel)(P...), dim3 grid, unsigned block, size_t shared_bytes, A... arguments) {
    check(launch(kernel, grid, block, shared_bytes, stream, arguments...));
  }
  // run_elements: a kernel whose threads stride over elements. run_warps: a kernel whose warps stride over items.
  template <class... P, class... A>
  void run_elements(void (*kernel)(P...), int64_t elements, A... arguments) {
    run(kernel, blocks(ceil_div(elements, threads)), threads, 0, arguments...);
  }
  template <class... P, class... A>
  void run_warps(void (*kernel)(P...), int64_t items, A... arguments) {
    run(kernel, blocks(ceil_div(items, warps)), threads, 0, arguments...);
  }

  // The product C = A B of gemm.cuh: `texel_product` in Real, where A or B has a plane's texels, which are few; `product` over
  // voxels, in TensorFloat-32 where tensor_floats().
  template <class A, class B, class Store>
  void texel_product(int64_t m, int n, int64_t k, int64_t k_chunk, A a, B b, Store store) {
    check(gemm<SmallTile, SmallTile>(m, n, k, k_chunk, a, b, store, stream));
  }
  template <class A, class B, class Store>
  void product(int64_t m, int n, int64_t k, int64_t k_chunk, A a, B b, Store store) {
    if constexpr (sizeof(Real) == sizeof(float)) {
      if (tensor_floats())
        return check(gemm<TensorFloats<128, 128>, TensorFloats<64, 64>>(m, n, k, k_chunk, a, b, store, stream));
      check(gemm<Scalars<Real, 128, 128, 8>, SmallTile>(m, n, k, k_chunk, a, b, store, stream));
    } else {
      texel_product(m, n, k, k_chunk, a, b, store);
    }
  }

  void add_column_sums(const Real* rows, int64_t count, int n, int64_t chunk, Real* partials) {
    run(add_column_sums_kernel<Real>, static_cast<unsigned>(ceil_div(count, chunk)), channel_threads(n), 0, rows, count, n,
        chunk, partials);
  }
  void add_total(const double* values, int count, double* total) {
    run(add_total_kernel, 1, threads, reduce_bytes, values, count, total);
  }
  void combine(const Partials<Real>& partials, int64_t rows, int64_t columns, const Real* factor, Real* out, int64_t pitch) {
    run_elements(combine_kernel<Real>, rows * columns, partials, rows, static_cast<int>(columns), factor, out, pitch);
  }

 private:
  using SmallTile = Scalars<Real, 64, 64, 16>;
  cudaError_t status_ = cudaSuccess;
};

}  // namespace tcam
