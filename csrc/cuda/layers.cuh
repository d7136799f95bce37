// decode_grid's general kernels, for every shape, in float64, float32 or TensorFloat-32, layer by layer over regions of the
// volume. (TensorFloat-32 has float16's mantissa and float32's range: where the fused kernels do not serve, it stands in for
// float16 and bfloat16, and needs no scale.)
//
// A region is a box of voxels small enough that its layers fit a fixed workspace. Forward: the first layer is sampled straight
// from the projected planes, each hidden layer is one product, the last a dot product a voxel. Backward recomputes a region's
// layers, walks them back, sums the first layer's gradient over k, j and i into maps dA, dB, dG, and adds weight gradients to
// partial sums, one for each fixed range of a region's voxels. Regions follow each other on the stream, so every sum has one
// order and no atomics are needed.
#pragma once
#include "../maths/half.h"
#include "planes.cuh"

namespace tcam {

constexpr int64_t region_voxels = 65536, region_bytes = 256ll << 20;
constexpr int64_t voxel_chunk = 512;  // of a region: one partial sum of the weight gradients
constexpr int64_t bias_chunk = 256;   // the same for bias gradients: a thread walks it alone

// Part of the box, in voxels of the box; voxel v of it is (i, j, k) with k fastest.
struct Region {
  int64_t i0, j0, k0;
  int ni, nj, nk;
  int64_t box[3];
  TCAM_HD int voxels() const { return ni * nj * nk; }
  TCAM_HD int64_t i(int v) const { return i0 + v / (nj * nk); }
  TCAM_HD int64_t j(int v) const { return j0 + v / nk % nj; }
  TCAM_HD int64_t k(int v) const { return k0 + v % nk; }
  TCAM_HD int64_t in_box(int v) const { return (i(v) * box[1] + j(v)) * box[2] + k(v); }
};

// ---- the first layer -----------------------------------------------------------------------

template <class Real>
struct Sampled {
  PlaneList<Real> planes;
  const Real* bias;  // null: none
  int n;
};

// z_1 (voxels, n): a warp takes a voxel, its lanes the channels.
template <class Real>
__global__ void __launch_bounds__(threads) first_layer_kernel(Sampled<Real> s, Region region, Real* z) {
  const int lane = threadIdx.x % 32;
  for (int v = blockIdx.x * warps + threadIdx.x / 32; v < region.voxels(); v += gridDim.x * warps) {
    const int64_t at[3] = {region.i(v), region.j(v), region.k(v)};
    for (int c = lane; c < s.n; c += 32) {
      Real sum = s.bias ? s.bias[c] : Real(0);
      for (int q = 0; q < s.planes.count; ++q)
        sum += bilinear(s.planes.plane[q], s.planes.columns[q], s.n, c, s.planes.rows_at[q][at[s.planes.row_axis[q]]],
                        s.planes.columns_at[q][at[s.planes.column_axis[q]]]);
      z[static_cast<int64_t>(v) * s.n + c] = sum;
    }
  }
}

// ---- operands of the products ----------------------------------------------------------------

// a(z) of a layer, rows are voxels.
template <class Real>
struct Activated {
  static constexpr bool columns_adjacent = true;
  const Real* z;
  int64_t pitch;
  Hidden<Real> activation;
  TCAM_DEVICE Real load(int64_t r, int64_t c) const { return z[r * pitch + c]; }
  TCAM_DEVICE Real value(Real x) const { return Maths<Scalar<Real>>::value(activation, x); }
};

// a'(z), with the conventions of maths/activation.h.
template <class Real>
TCAM_DEVICE Real slope_at(Hidden<Real> activation, Real z) {
  using M = Maths<Scalar<Real>>;
  const Real value = M::value(activation, z);
  return slope_from_value(activation.kind) ? M::slope_of_value(activation, value) : M::slope(activation, z, value);
}

template <class Real>
struct WriteDelta {
  Real* out;
  const Real* z;
  int64_t pitch;
  Hidden<Real> activation;
  TCAM_DEVICE void operator()(int, int64_t r, int c, Real sum) const {
    out[r * pitch + c] = sum * slope_at(activation, z[r * pitch + c]);
  }
};
// ---- the last layer --------------------------------------------------------------------------

enum class Finish { write, gradient, compare };

template <class Real>
struct LastLayer {
  const Real *z, *weight, *bias;  // weight (n_out, n_in); null with one layer, where z is the output itself
  int n_in, n_out;
  Hidden<Real> activation;
  Final<Real> output_activation;
  void* volume;  // of one object: written, or the gradient, or the target
  int dtype;
  int64_t channel_stride, voxel_stride;
  Loss loss;
  double beta;
  Real* delta;     // (voxels, n_out); null: not wanted
  double* losses;  // (voxels), of all channels
};

// A warp takes a voxel; its lanes share the dot product.
template <class Real, Finish what>
__global__ void __launch_bounds__(threads) last_layer_kernel(LastLayer<Real> p, Region region) {
  using M = Maths<Scalar<Real>>;
  using L = LossMaths<Scalar<Real>>;
  const int lane = threadIdx.x % 32;
  for (int v = blockIdx.x * warps + threadIdx.x / 32; v < region.voxels(); v += gridDim.x * warps) {
    const Real* z = p.z + static_cast<int64_t>(v) * p.n_in;
    double total = 0;
    for (int o = 0; o < p.n_out; ++o) {
      Real sum = 0;
      if (p.weight) {
        for (int c = lane; c < p.n_in; c += 32) sum += M::value(p.activation, z[c]) * p.weight[o * p.n_in + c];
        for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
        if (p.bias) sum += p.bias[o];
      } else {
        sum = z[o];
      }
      if (lane) continue;
      const int64_t at = o * p.channel_stride + region.in_box(v) * p.voxel_stride;
      if (what == Finish::write) {
        Elements<Real>::write(p.volume, p.dtype, at, output_of<true>(p.output_activation, sum));
        continue;
      }
      Real delta = Elements<Real>::read(p.volume, p.dtype, at);
      if (what == Finish::compare) {
        const Real difference = output_of<true>(p.output_activation, sum) - delta;
        total += static_cast<double>(L::value(p.loss, difference, p.beta));
        delta = L::slope(p.loss, difference, p.beta);
      }
      if (p.delta) p.delta[static_cast<int64_t>(v) * p.n_out + o] = delta * output_slope_of<true>(p.output_activation, sum);
    }
    if (what == Finish::compare && lane == 0) p.losses[v] = total;
  }
}

// delta_(L-1) = (delta_L W_L) a'(z_(L-1)): C_out is small, so an element is a few products.
template <class Real>
__global__ void __launch_bounds__(threads) last_delta_kernel(const Real* delta, int n_out, const Real* weight, const Real* z,
                                                             int n, Hidden<Real> activation, int64_t elements, Real* out) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < elements;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t v = e / n, c = e % n;
    Real sum = 0;
    for (int o = 0; o < n_out; ++o) sum += delta[v * n_out + o] * weight[o * n + c];
    out[e] = sum * slope_at(activation, z[e]);
  }
}

// ---- the call ----------------------------------------------------------------------------------

template <class Real>
class Layers : public Planes<Real> {
 protected:
  using Base = Planes<Real>;
  using Base::add_axis_sum, Base::blocks, Base::channel_threads, Base::check, Base::width;
  using Base::biases_, Base::da_, Base::db_, Base::dg_, Base::n_, Base::p, Base::status_, Base::stream_, Base::weights_;

 public:
  Layers(const tcam_problem& problem, bool backward, void* workspace, cudaStream_t stream) : Base(problem, stream) {
    choose_region(backward, 0);
    Carver ws(workspace);
    this->carve_planes(ws, backward);
    carve_layers(ws, backward);
    if (backward && p.grad_decoder) {
      this->begin_partials(ws);
      carve_partials(ws);
      this->end_partials(ws, workspace);
    }
    this->bytes_ = ws.used();
  }

  // Which kernels those are.
  void describe(Output, char* text, size_t size) const {
    snprintf(text, size, "layer by layer, %s products",
             tensor_floats()                 ? "TensorFloat-32"
             : sizeof(Real) == sizeof(float) ? "float32"
                                             : "float64");
  }

 protected:
  Layers(const tcam_problem& problem, cudaStream_t stream) : Base(problem, stream) {}  // points.cuh carves for itself

  int64_t region_size_[3], most_ = 0;
  Real *z_[TCAM_MAX_LAYERS + 1] = {}, *delta_[2] = {};
  double* losses_ = nullptr;
  Real *weight_partials_[TCAM_MAX_LAYERS + 1] = {}, *bias_partials_[TCAM_MAX_LAYERS + 1] = {};

  int64_t splits() const { return ceil_div(most_, voxel_chunk); }
  int64_t bias_splits() const { return ceil_div(most_, bias_chunk); }

  // As many whole rows and slices as the voxels allowed, from the problem alone; `more`: bytes a voxel that others need.
  void choose_region(bool backward, int64_t more) {
    int64_t each = sizeof(double) + more, widest = 1;  // bytes a voxel
    for (int l = 1; l <= p.layers; ++l) {
      widest = width(l) > widest ? width(l) : widest;
      if (backward) each += width(l) * sizeof(Real);
    }
    each += 2 * widest * sizeof(Real);
    choose_region_of(each, region_voxels);
  }
  void choose_region_of(int64_t each, int64_t voxels) {
    int64_t left = p.tile > 0 ? p.tile : voxels;
    if (left > region_bytes / each) left = region_bytes / each;
    for (int a = 2; a >= 0; --a) {
      region_size_[a] = n_[a] < left ? n_[a] : left;
      left = left / region_size_[a] > 1 ? left / region_size_[a] : 1;
    }
    most_ = region_size_[0] * region_size_[1] * region_size_[2];
  }

  void carve_layers(Carver& ws, bool backward) {
    const int L = p.layers;
    auto reals = [&](int64_t count) { return Base::reals(ws, count); };
    losses_ = reinterpret_cast<double*>(ws.take(most_ * static_cast<int64_t>(sizeof(double))));
    int widest = 1;
    for (int l = 1; l <= L; ++l) widest = width(l) > widest ? width(l) : widest;
    if (!backward) {
      Real* two[2] = {reals(most_ * widest), reals(L > 2 ? most_ * widest : 0)};
      for (int l = 1; l <= L; ++l) z_[l] = two[l & 1 ? 0 : 1];
      return;
    }
    for (int l = 1; l < L || l == 1; ++l) z_[l] = reals(most_ * width(l));
    delta_[0] = reals(most_ * widest);
    delta_[1] = reals(most_ * widest);
  }
  void carve_partials(Carver& ws) {
    for (int l = 2; l <= p.layers; ++l) {
      weight_partials_[l] = Base::reals(ws, splits() * width(l) * width(l - 1));
      bias_partials_[l] = Base::reals(ws, bias_splits() * width(l));
    }
  }

  void walk(int64_t object, void* volume, const tcam_objective* objective, double* losses, bool backward) override {
    for_each_region([&](const Region& region) {
      const Sampled<Real> sampled = {this->projected(-1), biases_[1], width(1)};
      check(launch(first_layer_kernel<Real>, blocks(ceil_div(region.voxels(), warps)), threads, 0, stream_, sampled, region,
                   z_[1]));
      hidden_layers(region.voxels());
      const int64_t stride = n_[0] * n_[1] * n_[2];
      const int dtype = objective ? objective->target_dtype : p.out_dtype;
      void* at = static_cast<char*>(volume) + object * width(p.layers) * stride * dtype_bytes(dtype);
      last_layer(region, {at, stride, 1}, objective, losses + object, backward ? delta_[p.layers & 1] : nullptr);
      if (backward) walk_back(region);
    });
  }

  void write_gradients() override {
    for (int l = 2; l <= p.layers; ++l) {
      const int64_t n = width(l), m = width(l - 1);
      this->combine({weight_partials_[l], splits(), n * m, m}, n, m, nullptr, this->grad_weight_[l], m);
      if (this->grad_bias_[l]) this->combine({bias_partials_[l], bias_splits(), n, n}, 1, n, nullptr, this->grad_bias_[l], n);
    }
  }

  template <class F>
  void for_each_region(F f) {
    for (int64_t i = 0; i < n_[0]; i += region_size_[0])
      for (int64_t j = 0; j < n_[1]; j += region_size_[1])
        for (int64_t k = 0; k < n_[2] && !status_; k += region_size_[2]) {
          auto extent = [&](int a, int64_t at) {
            return static_cast<int>(n_[a] - at < region_size_[a] ? n_[a] - at : region_size_[a]);
          };
          f(Region{i, j, k, extent(0, i), extent(1, j), extent(2, k), {n_[0], n_[1], n_[2]}});
        }
  }

  // Whether the hidden layers' products are TensorFloat-32 on tensor cores.
  bool tensor_floats() const { return sizeof(Real) == sizeof(float) && p.compute != TCAM_F32; }

  template <class A, class B, class Store>
  cudaError_t product(int64_t m, int n, int64_t k, int64_t k_chunk, A a, B b, Store store) {
    if constexpr (sizeof(Real) == sizeof(float))
      if (tensor_floats()) return gemm<TensorFloats>(m, n, k, k_chunk, a, b, store, stream_);
    return gemm<Scalars<Real, 64>>(m, n, k, k_chunk, a, b, store, stream_);
  }

  // z of layers 2 to L-1, from z_1.
  void hidden_layers(int64_t voxels) {
    for (int l = 2; l < p.layers; ++l)
      check(product(voxels, width(l), width(l - 1), 0, Activated<Real>{z_[l - 1], width(l - 1), this->activation(l - 1)},
                    Transposed<Real>{weights_[l], width(l - 1)}, WriteRows<Real>{z_[l], width(l), biases_[l]}));
  }

  struct Layout {
    void* data;
    int64_t channel_stride, voxel_stride;
  };
  void last_layer(const Region& region, const Layout& volume, const tcam_objective* objective, double* loss, Real* delta) {
    const int L = p.layers, dtype = objective ? objective->target_dtype : p.out_dtype;
    const Real* z = z_[L > 1 ? L - 1 : 1];
    const LastLayer<Real> last = {z,
                                  L > 1 ? weights_[L] : nullptr,
                                  biases_[L],
                                  L > 1 ? width(L - 1) : width(1),
                                  width(L),
                                  this->activation(L - 1),
                                  this->output_activation(),
                                  volume.data,
                                  dtype,
                                  volume.channel_stride,
                                  volume.voxel_stride,
                                  objective ? static_cast<Loss>(objective->loss) : Loss::mse,
                                  objective ? objective->beta : 0,
                                  delta,
                                  losses_};
    const unsigned grid = blocks(ceil_div(region.voxels(), warps));
    switch (objective ? Finish::compare : delta ? Finish::gradient : Finish::write) {
      case Finish::write: check(launch(last_layer_kernel<Real, Finish::write>, grid, threads, 0, stream_, last, region)); break;
      case Finish::gradient:
        check(launch(last_layer_kernel<Real, Finish::gradient>, grid, threads, 0, stream_, last, region));
        break;
      case Finish::compare:
        check(launch(last_layer_kernel<Real, Finish::compare>, grid, threads, 0, stream_, last, region));
        check(launch(add_total_kernel, 1, threads, reduce_bytes, stream_, losses_, region.voxels(), loss));
    }
  }

  // From delta_L in delta_[L & 1] to delta_1 in delta_[1], and to the partial sums of the decoder's gradients.
  void back_to_first(int64_t voxels) {
    for (int l = p.layers; l >= 2; --l) {
      const Real* delta = delta_[l & 1];
      const int n = width(l), m = width(l - 1);
      if (p.grad_decoder) {
        const Transposed<Real> a = {delta, n};
        const Activated<Real> b = {z_[l - 1], m, this->activation(l - 1)};
        const AddPartial<Real> add = {weight_partials_[l], n, m};
        check(n <= 16 ? gemm<Scalars<Real, 16>>(n, m, voxels, voxel_chunk, a, b, add, stream_)
                      : product(n, m, voxels, voxel_chunk, a, b, add));
        check(launch(add_column_sums_kernel<Real>, static_cast<unsigned>(ceil_div(voxels, bias_chunk)), channel_threads(n), 0,
                     stream_, delta, voxels, n, bias_chunk, bias_partials_[l]));
      }
      Real* next = delta_[(l - 1) & 1];
      if (l == p.layers)
        check(launch(last_delta_kernel<Real>, blocks(ceil_div(voxels * m, threads)), threads, 0, stream_, delta, n, weights_[l],
                     z_[l - 1], m, this->activation(l - 1), voxels * m, next));
      else
        check(product(voxels, m, n, 0, Rows<Real>{delta, n}, Rows<Real>{weights_[l], m},
                      WriteDelta<Real>{next, z_[l - 1], m, this->activation(l - 1)}));
    }
  }
  void walk_back(const Region& region) {
    back_to_first(region.voxels());
    const int64_t slice = static_cast<int64_t>(region.nj) * region.nk, row = region.nk;
    const int n1 = width(1);
    add_axis_sum(delta_[1], da_ + (region.i0 * n_[1] + region.j0) * n1, n_[1], region.ni, region.nj, region.nk, slice, row, 1);
    add_axis_sum(delta_[1], db_ + (region.j0 * n_[2] + region.k0) * n1, n_[2], region.nj, region.nk, region.ni, row, 1, slice);
    add_axis_sum(delta_[1], dg_ + (region.i0 * n_[2] + region.k0) * n1, n_[2], region.ni, region.nk, region.nj, slice, 1, row);
  }
};

}  // namespace tcam
