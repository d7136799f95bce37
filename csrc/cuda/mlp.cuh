// The MLP above the first layer, for every shape, layer by layer over a region's rows of z_1. Products are in float64, float32
// or TensorFloat-32. TensorFloat-32 has float16's mantissa and float32's range, so it also serves calls that ask for float16 or
// bfloat16 where the fused kernels do not take them, and needs no scale.
//
// z_l is layer l before its activation, delta_l the gradient of z_l, both (voxels of the region, width of layer l). Rows of z_1
// and delta_1 also have the parts of higher layers that read the features (skips), which are added to their z_l. Each hidden
// layer is one matrix product, and so is a last layer of many outputs; else that is a dot product for each voxel. Backward
// recomputes the region's z_l, computes delta_L down to delta_1, and adds weight gradients to partial sums, one for each range
// of voxel_chunk voxels of a region.
#pragma once
#include "context.cuh"
#include "mlp_kernels.cuh"
#include "region.cuh"

namespace tcam {

template <class Real>
class Mlp {
 public:
  using Input = Real*;  // z_1: (voxels of a region, first_width)

  explicit Mlp(Context<Real>& context) : c(context), p(context.p) {}

  Refusal refuses(const int64_t*) const { return {}; }  // takes every shape, on every device
  Refusal refuses(Output, const Device&) const { return {}; }
  void describe(Output, char* text, size_t size) const {
    snprintf(text, size, "layer by layer, %s products",
             c.tensor_floats()               ? "TensorFloat-32"
             : sizeof(Real) == sizeof(float) ? "float32"
                                             : "float64");
  }

  // Regions that fit, with the arrays of both the first layer and the MLP, a workspace of region_bytes. They depend on the
  // problem alone, not on the device, and so does the order of every sum.
  template <class First>
  Regions regions(const First& first) const {
    int64_t each = sizeof(double) + first.voxel_bytes() + 2 * widest() * sizeof(Real);
    for (int l = 1; l <= p.layers && c.backward; ++l) each += c.width(l) * sizeof(Real);
    if (skips()) each += 2 * c.first_width() * sizeof(Real);
    const int64_t most = p.tile > 0 ? p.tile : region_voxels, fit = region_bytes / each;
    return Regions::of(first.box(), most < fit ? most : fit);
  }

  void carve(Carver& ws, const Regions& regions) {
    const int L = p.layers;
    most_ = regions.most();
    losses_ = ws.array<double>(most_);
    if (!c.backward) {
      Real* two[2] = {ws.array<Real>(most_ * widest()), ws.array<Real>(L > 2 || wide() ? most_ * widest() : 0)};
      for (int l = 1; l <= L; ++l) z_[l] = two[l & 1 ? 0 : 1];
      if (skips()) z_[1] = ws.array<Real>(most_ * c.first_width());
      return;
    }
    for (int l = 1; l < L || l == 1 || (l == L && wide()); ++l) z_[l] = ws.array<Real>(most_ * pitch(l));
    for (Real*& delta : delta_) delta = ws.array<Real>(most_ * widest());
    delta_1_ = skips() ? ws.array<Real>(most_ * c.first_width()) : delta_[1];
  }
  void carve_partials(Carver& ws) {
    for (int l = 2; l <= p.layers; ++l) {
      weight_partials_[l] = ws.array<Real>(splits() * c.width(l) * c.width(l - 1));
      bias_partials_[l] = ws.array<Real>(splits() * c.width(l));
    }
  }

  void begin(const void*, const tcam_objective*, int64_t) {}
  Input input() const { return z_[1]; }
  const Real* delta() const { return delta_1_; }

  // Computes the region's output from z_1 and writes it to `volume` or, with an objective, adds its losses to *loss.
  void forward(const Region& region, const Volume& volume, const tcam_objective* objective, double* loss) {
    hidden_layers(region.voxels());
    last_layer(region, volume, objective, loss, nullptr);
  }
  // Computes delta_1 from z_1 and `volume` (the output's gradient, or the target with an objective), and adds to the partial
  // sums of layers 2 and up.
  void backward(const Region& region, const Volume& volume, const tcam_objective* objective, double* loss) {
    hidden_layers(region.voxels());
    last_layer(region, volume, objective, loss, delta_[p.layers & 1]);
    walk_back(region.voxels());
  }

  void write_gradients() {
    for (int l = 2; l <= p.layers; ++l) {
      const int64_t n = c.width(l), m = c.width(l - 1);
      c.combine({weight_partials_[l], splits(), n * m, m}, n, m, nullptr, c.grad_weights[l], m);
      if (c.grad_biases[l]) c.combine({bias_partials_[l], splits(), n, n}, 1, n, nullptr, c.grad_biases[l], n);
    }
  }

 private:
  Context<Real>& c;
  const tcam_problem& p;
  int64_t most_ = 0;  // voxels of the largest region
  // z_[l]: z_l; in forward, odd and even layers share one array each, but z_1 with skips has its own. delta_[l & 1]: delta_l;
  // delta_1_: delta_[1], or with skips an array of its own.
  Real *z_[TCAM_MAX_LAYERS + 1] = {}, *delta_[2] = {}, *delta_1_ = nullptr;
  double* losses_ = nullptr;  // (most_)
  Real *weight_partials_[TCAM_MAX_LAYERS + 1] = {}, *bias_partials_[TCAM_MAX_LAYERS + 1] = {};

  int64_t splits() const { return ceil_div(most_, voxel_chunk); }
  int64_t widest() const {
    int most = 1;
    for (int l = 1; l <= p.layers; ++l) most = c.width(l) > most ? c.width(l) : most;
    return most;
  }
  bool skips() const { return p.first_width != p.width[1]; }
  int pitch(int l) const { return l == 1 ? c.first_width() : c.width(l); }  // of z_l and delta_l
  Activated<Real> activated(int l) const { return {z_[l], pitch(l), c.activation(l)}; }

  // Whether the last of several layers is a matrix product.
  bool wide() const { return p.layers > 1 && c.width(p.layers) > 16; }

  // z_2 to z_(L-1), and z_L of a wide last layer.
  void hidden_layers(int64_t voxels) {
    for (int l = 2; l < p.layers + wide(); ++l) {
      const Transposed<Real> weight = {c.weights[l], c.width(l - 1)};
      if (p.skip[l]) {
        const int n = c.width(l);
        c.run_elements(copy_columns_kernel<Real>, voxels * n, z_[1] + p.skip[l], c.first_width(), voxels, n, c.biases[l], z_[l],
                       n);
        c.product(voxels, n, c.width(l - 1), 0, activated(l - 1), weight, AddRows<Real>{z_[l], n});
      } else {
        c.product(voxels, c.width(l), c.width(l - 1), 0, activated(l - 1), weight,
                  WriteRows<Real>{z_[l], c.width(l), c.biases[l]});
      }
    }
  }

  // The last layer and, where `delta` is not null, delta_L.
  void last_layer(const Region& region, const Volume& volume, const tcam_objective* objective, double* loss, Real* delta) {
    const int L = p.layers;
    const bool known = L == 1 || wide();  // z_L
    const int in = known ? L : L - 1;
    const LastLayer<Real> last = {z_[in],
                                  known ? nullptr : c.weights[L],
                                  c.biases[L],
                                  c.width(in),
                                  c.width(L),
                                  c.activation(L - 1),
                                  c.output_activation(),
                                  volume.data,
                                  volume.dtype,
                                  volume.channel_stride,
                                  volume.voxel_stride,
                                  objective ? static_cast<Loss>(objective->loss) : Loss::mse,
                                  objective ? objective->beta : 0,
                                  delta,
                                  losses_};
    auto kernel = objective ? last_layer_kernel<Real, Finish::compare>
                  : delta   ? last_layer_kernel<Real, Finish::gradient>
                            : last_layer_kernel<Real, Finish::write>;
    c.run_warps(kernel, region.voxels(), last, region);
    if (objective) c.add_total(losses_, region.voxels(), loss);
  }

  // Computes delta_(L-1) to delta_1 from delta_L, and adds to the partial sums of layers L to 2. delta_l is in delta_[l & 1].
  void walk_back(int64_t voxels) {
    if (skips()) c.clear(delta_1_, voxels * c.first_width() * static_cast<int64_t>(sizeof(Real)));  // between the parts
    for (int l = p.layers; l >= 2; --l) {
      const Real* delta = delta_[l & 1];
      const int n = c.width(l), m = c.width(l - 1);
      if (p.skip[l])
        c.run_elements(copy_columns_kernel<Real>, voxels * n, delta, n, voxels, n, nullptr, delta_1_ + p.skip[l],
                       c.first_width());
      if (p.grad_decoder) {
        const Transposed<Real> a = {delta, n};
        const AddPartial<Real> add = {weight_partials_[l], n, m, bias_partials_[l]};
        if (n <= 16)
          c.check(gemm<Scalars<Real, 16, 64, 16>, Scalars<Real, 16, 64, 16>>(n, m, voxels, voxel_chunk, a, activated(l - 1),
                                                                             add, c.stream));
        else
          c.product(n, m, voxels, voxel_chunk, a, activated(l - 1), add);
      }
      Real* next = l == 2 ? delta_1_ : delta_[(l - 1) & 1];
      if (l == p.layers && !wide()) {
        const int across = static_cast<int>(c.channel_threads(m));
        c.run(last_delta_kernel<Real>, c.blocks(ceil_div(voxels * across, 8 * threads)), threads, 0, delta, n, c.weights[l],
              z_[l - 1], m, c.activation(l - 1), static_cast<int>(voxels), across, next);
      } else {
        c.product(voxels, m, n, 0, Rows<Real>{delta, n}, Rows<Real>{c.weights[l], m},
                  WriteDelta<Real>{next, z_[l - 1], pitch(l - 1), c.activation(l - 1)});
      }
    }
  }
};

}  // namespace tcam
