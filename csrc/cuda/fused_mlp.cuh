// The MLP above the first layer on tensor cores: the kernels of fused_forward.cuh and fused_backward.cuh, over 16-bit maps of
// the first layer. A grid is processed in slabs of i, whose maps, masks and delta_1 fit a workspace of fixed size.
#pragma once
#include "context.cuh"
#include "fused_backward.cuh"
#include "fused_forward.cuh"
#include "fused_mlp_kernels.cuh"
#include "region.cuh"

namespace tcam {

constexpr int64_t slab_bytes_forward = 256ll << 20, slab_bytes_backward = 1152ll << 20;

// The reason, if any, why the fused kernels do not take a problem on any device: options, activations, layers or widths.
inline Refusal fused_refusal(const tcam_problem& p) {
  const int L = p.layers;
  if (p.dtype != TCAM_F32 || (p.compute != TCAM_BF16 && p.compute != TCAM_F16))
    return {"they have bfloat16 or float16 products (compute_dtype), which the call does not ask for", 0, 0};
  for (int l = 1; l < L; ++l)
    if (static_cast<Activation>(p.activation[l - 1].kind) != Activation::relu) return {"hidden layer %lld is not a relu", l, 0};
  if (static_cast<OutputActivation>(p.output_activation.kind) == OutputActivation::half_sine)
    return {"output_activation is half_sine, which they do not have", 0, 0};
  if (L < 3 || L - 2 > fused_most_products)
    return {"there are %lld layers, and they take 3 to %lld", L, fused_most_products + 2};
  if (p.first_width != p.width[1]) return {"layers above the first read the features (skips)", 0, 0};
  if (p.width[L] > fused_most_out) return {"there are %lld outputs, and they take up to %lld", p.width[L], fused_most_out};
  for (int l = 1; l < L; ++l)
    if (p.width[l] > 128) return {"a hidden layer is %lld wide, and they take up to %lld", p.width[l], 128};
  return {};
}

// The maps of a slab that the first layer writes: a (ni, nj, channels), b (nj, nk, channels), g (ni, nk, channels).
struct FusedInput {
  uint16_t *a, *b, *g;
  int channels;  // padded channels of a row
  bool bfloat;   // bfloat16, else float16
};
// The slab's delta_1 that the first layer reads.
struct FusedDelta {
  const uint16_t* rows;  // (ni, nj, nk, channels), channels in the order of delta1_column
  const float* factor;   // delta_1 is rows times *factor; null: 1
  int channels;
  bool bfloat;
  int processors;  // multiprocessors of the device
};

// Calls f with the 16-bit format, a ptx::BFloat16 or a ptx::Float16.
template <class F>
void with_format(bool bfloat, F f) {
  if (bfloat)
    f(ptx::BFloat16());
  else
    f(ptx::Float16());
}

class FusedMlp {
 public:
  using Input = FusedInput;

  explicit FusedMlp(Context<float>& context) : c(context), p(context.p) {
    N_ = 64;
    for (int l = 1; l < p.layers; ++l) N_ = p.width[l] > 64 ? 128 : N_;
  }

  // The reasons why the kernels do not take the problem: its options and shape; and on a device, a block's shared memory.
  Refusal refuses(const int64_t* box) const {
    const Refusal refusal = fused_refusal(p);
    if (!refusal.why && (box[0] > INT32_MAX / box[1] || box[0] * box[1] > INT32_MAX / ceil_div(box[2], 32)))
      return {"they count tiles of 32 voxels in 31 bits", 0, 0};
    return refusal;
  }
  Refusal refuses(Output output, const Device& device) {
    device_ = device;
    if (output != Output::volume && p.compute == TCAM_F16 && c.output_activation().kind == OutputActivation::trunc_exp)
      return {"the gradient of output_activation trunc_exp is beyond float16", 0, 0};
    size_t needs = 0;
    if (output == Output::volume) {
      kind_ = choose_fused_forward(N_, products(), device, &needs);
      if (kind_) return {};
    } else {
      needs = shared_bytes(output);
      if (needs <= static_cast<size_t>(device.shared_limit)) return {};
    }
    return {"a block needs %lld bytes of shared memory and has %lld", static_cast<long long>(needs), device.shared_limit};
  }
  void describe(Output output, char* text, size_t size) const {
    const char* type = bfloat() ? "bfloat16" : "float16";
    if (output == Output::volume)
      snprintf(text, size, "fused, on tensor cores in %s by %s: %d channels, %d products, teams of %d x %d tiles", type,
               kind_->mt == 1 ? "wgmma" : "mma.sync", N_, products(), kind_->wi, kind_->wj);
    else
      snprintf(text, size, "fused, on tensor cores in %s by %s: %d channels, %d products, %d launches", type,
               device_.warpgroups ? "wgmma" : "mma.sync", N_, products(), launches(output).count);
  }

  // Slabs: a multiple of fused_backward_wide of i (fewer only in a small box), all j and k. They depend on the problem alone.
  template <class First>
  Regions regions(const First& first) const {
    const int64_t* n = first.box();
    const int64_t N = N_, voxels = n[1] * n[2], wide = fused_backward_wide;
    int64_t each = (n[1] + n[2]) * N * 2, budget = slab_bytes_forward;
    if (c.backward) {  // masks and dl/dy are per step, which rounds i up to a multiple of `wide` and k of 32
      const int64_t padded = steps(wide, n[1], n[2]) * fused_backward_step_voxels / wide;
      each += padded * (N / 8 * products() + 4 * n_out()) + voxels * N * 2 + first.slice_bytes();
      budget = slab_bytes_backward;
    }
    int64_t slab = budget / each;
    if (c.backward && p.tile > 0 && slab > p.tile / voxels) slab = p.tile / voxels;
    if (slab > wide) slab = slab / wide * wide;
    if (slab < wide) slab = wide;
    if (slab > n[0]) slab = n[0];
    return {{n[0], n[1], n[2]}, {slab, n[1], n[2]}};
  }

  void carve(Carver& ws, const Regions& r) {
    const int64_t N = N_, P = products(), ni = r.size[0], nj = r.size[1], nk = r.size[2];
    constexpr int64_t step_voxels = fused_backward_step_voxels, chain_threads = fused_backward_most_chain_threads;
    steps_ = steps(ni, nj, nk);
    maps_ = {ws.array<uint16_t>(ni * nj * N), ws.array<uint16_t>(nj * nk * N), ws.array<uint16_t>(ni * nk * N), N_, bfloat()};
    panels_ = ws.array<uint16_t>(P * N * N);
    panel_biases_ = ws.array<float>(P * N);
    last_ = ws.array<float>(fused_most_out * N);
    last_bias_ = ws.array<float>(fused_most_out);
    losses_ = ws.array<double>(fused_most_blocks * chain_threads);
    dy_sums_ = ws.array<double>(fused_most_blocks * chain_threads);
    if (!c.backward) return;
    panels_back_ = ws.array<uint16_t>(P * N * N);
    masks_ = ws.array<char>(P * steps_ * step_voxels * N / 8);
    dy_ = ws.array<float>(steps_ * step_voxels * n_out());
    delta1_ = ws.array<uint16_t>(ni * nj * nk * N);
    largest_ = ws.array<float>(scale_blocks);
    scale_ = ws.array<float>(5);
  }
  void carve_partials(Carver& ws) {
    for (int l = 2; l <= p.layers; ++l) {
      sums_[l] = ws.array<float>(most_blocks() * N_ * N_);
      row_sums_[l] = ws.array<float>(most_blocks() * 2 * N_);
      if (l == p.layers - 1 && n_out() == 1) break;
    }
    dy_total_ = ws.array<double>(1);
  }

  // Pads and rounds the weights and, for gradients in float16, chooses the scales. `volume`: the output's gradient or the
  // target, of `voxels` voxels in all rounds; null in forward.
  void begin(const void* volume, const tcam_objective* objective, int64_t voxels) {
    if (volume && p.compute == TCAM_F16) choose_scales(volume, objective, voxels * n_out());
    with_format(bfloat(), [&](auto format) { pad<decltype(format)>(); });
  }
  Input input() const { return maps_; }
  FusedDelta delta() const { return {delta1_, factor_, N_, bfloat(), device_.processors}; }

  // Computes a slab's output, or its losses, from the maps in input(); backward computes its delta_1 and partial sums.
  void forward(const Region& slab, const Volume& volume, const tcam_objective* objective, double* loss) {
    run(slab_maps(slab), slab_volume(slab, volume), objective, loss, objective ? Output::losses : Output::volume);
  }
  void backward(const Region& slab, const Volume& volume, const tcam_objective* objective, double* loss) {
    run(slab_maps(slab), slab_volume(slab, volume), objective, loss, Output::gradients);
  }

  // Launches the kernels over maps. Output::volume writes the output at volume.data; the others read the target or the gradient
  // there, add the losses to *loss if there is an objective, and for gradients write delta_1 and add to the partial sums.
  void run(const FusedMaps& maps, const Volume& volume, const tcam_objective* objective, double* loss, Output output) {
    const Launches all = launches(output);
    if (!all.count) {
      const FusedForward call = {
          maps,        panels_,      panel_biases_,        last_, last_bias_, n_out(), c.output_activation(),
          volume.data, volume.dtype, volume.channel_stride};
      auto launch = bfloat() ? fused_forward_bfloat16 : fused_forward_float16;
      return c.check(launch(call, *kind_, products(), device_, c.stream));
    }
    FusedBackward call = backward_call(maps, volume, objective, output);
    const int64_t steps = fused_backward_steps(maps);
    const int64_t most = device_.processors < fused_most_blocks ? device_.processors : fused_most_blocks;
    const int grid = static_cast<int>(steps < most ? steps : most);
    const int chain_threads = fused_backward_chain_threads(device_.warpgroups);
    auto launch = bfloat() ? fused_backward_bfloat16 : fused_backward_float16;
    for (int e = 0; e < all.count; ++e) {
      call.layer = all.all[e].layer;
      call.head = all.all[e].head;
      call.sums = sums_[call.layer];
      call.row_sums = row_sums_[call.layer];
      c.check(launch(call, N_, device_.warpgroups, grid, c.stream));
      if (!call.head) continue;
      if (objective) c.add_total(losses_, grid * chain_threads, loss);
      if (call.weighted && n_out() == 1) c.add_total(dy_sums_, grid * chain_threads, dy_total_);
    }
  }

  void write_gradients() {
    const int64_t N = N_;
    const int L = p.layers, top = L - 1;
    const bool one = n_out() == 1;
    auto sums = [&](int l) { return Partials<float>{sums_[l], most_blocks(), N * N, N}; };
    auto row_sums = [&](int l) { return Partials<float>{row_sums_[l], most_blocks() * 2, N, N}; };
    for (int l = 2; l <= (one ? L - 2 : L); ++l) {
      const float* factor = l == L ? top_factor_ : factor_;
      c.combine(sums(l), c.width(l), c.width(l - 1), factor, c.grad_weights[l], c.width(l - 1));
      if (c.grad_biases[l]) c.combine(row_sums(l), 1, c.width(l), factor, c.grad_biases[l], c.width(l));
    }
    if (!one) return;
    const TopLayers call = {sums(top),
                            row_sums(top),
                            panels_ + (products() - 1) * N * N,
                            panel_biases_ + (products() - 1) * N,
                            last_,
                            N_,
                            c.width(top - 1),
                            top_factor_,
                            c.grad_weights[top],
                            c.grad_biases[top],
                            c.grad_weights[L]};
    auto kernel = bfloat() ? combine_top_kernel<ptx::BFloat16> : combine_top_kernel<ptx::Float16>;
    c.run(kernel, static_cast<unsigned>(c.width(top)), threads, reduce_bytes, call);
    if (c.grad_biases[L]) c.run(write_scalar_kernel, 1, 1, 0, dy_total_, top_factor_, c.grad_biases[L]);
  }

 private:
  // A launch of the backward kernel: FusedBackward's layer and head.
  struct Launch {
    int layer;
    bool head;
  };
  struct Launches {
    Launch all[TCAM_MAX_LAYERS];
    int count = 0;
    void add(int layer, bool head) { all[count++] = {layer, head}; }
  };

  Context<float>& c;
  const tcam_problem& p;
  Device device_ = {};
  const FusedForwardKind* kind_ = nullptr;  // the forward kernel, chosen by refuses(Output::volume, device)
  int N_ = 0;                               // padded width of the hidden layers
  int64_t steps_ = 0;                       // steps of the backward kernel over the largest slab
  FusedInput maps_ = {};
  // The arrays of FusedForward and FusedBackward that have the same names; panels_ are the `weights`.
  uint16_t *panels_ = nullptr, *panels_back_ = nullptr;
  float *panel_biases_ = nullptr, *last_ = nullptr, *last_bias_ = nullptr;
  char* masks_ = nullptr;
  uint16_t* delta1_ = nullptr;
  float *dy_ = nullptr, *largest_ = nullptr, *scale_ = nullptr;
  // float16's scales: scale_[0] multiplies dl/dy, scale_[2] the last layer's weights on the way back. *top_factor_ undoes the
  // first, *factor_ both. Null in bfloat16, which needs none.
  const float *top_factor_ = nullptr, *factor_ = nullptr;
  float *sums_[TCAM_MAX_LAYERS + 1] = {}, *row_sums_[TCAM_MAX_LAYERS + 1] = {};
  double *losses_ = nullptr, *dy_sums_ = nullptr, *dy_total_ = nullptr;

  int products() const { return p.layers - 2; }
  int n_out() const { return c.width(p.layers); }
  bool bfloat() const { return p.compute == TCAM_BF16; }
  int64_t most_blocks() const { return steps_ < fused_most_blocks ? steps_ : fused_most_blocks; }
  static int64_t steps(int64_t ni, int64_t nj, int64_t nk) {
    return fused_backward_steps({nullptr, nullptr, nullptr, static_cast<int>(ni), static_cast<int>(nj), static_cast<int>(nk)});
  }
  FusedMaps slab_maps(const Region& slab) const { return {maps_.a, maps_.b, maps_.g, slab.ni, slab.nj, slab.nk}; }
  static Volume slab_volume(const Region& slab, Volume volume) {
    volume.data = static_cast<char*>(volume.data) + slab.in_box(0) * dtype_bytes(volume.dtype);
    return volume;
  }

  // The launches of the backward kernel. The first, the head, also computes the weight gradient of layer P+1 where there is one
  // output, and of the last layer where there are more. Without decoder gradients, only the head and layer 2 (for delta_1) are
  // launched.
  Launches launches(Output output) const {
    Launches all;
    if (output == Output::volume) return all;
    const int first = n_out() == 1 && output == Output::gradients ? p.layers - 1 : p.layers;
    all.add(first, true);
    for (int l = first - 1; l >= 2 && output == Output::gradients; --l)
      if (p.grad_decoder || l == 2) all.add(l, false);
    return all;
  }
  // Shared memory of a block in the launch that takes most.
  size_t shared_bytes(Output output) const {
    const Launches all = launches(output);
    size_t most = 0;
    for (int e = 0; e < all.count; ++e) {
      FusedBackward call = {};
      call.products = products();
      call.layer = all.all[e].layer;
      call.head = all.all[e].head;
      const size_t bytes = fused_backward_bytes(call, N_, device_.warpgroups);
      most = bytes > most ? bytes : most;
    }
    return most;
  }

  FusedBackward backward_call(const FusedMaps& maps, const Volume& volume, const tcam_objective* objective, Output output) {
    FusedBackward call = {};
    call.maps = maps;
    call.weights = panels_;
    call.weights_back = panels_back_;
    call.biases = panel_biases_;
    call.last = last_;
    call.last_bias = last_bias_;
    call.products = products();
    call.n_out = n_out();
    call.weighted = output == Output::gradients && p.grad_decoder;
    call.volume = volume.data;
    call.dtype = volume.dtype;
    call.channel_stride = volume.channel_stride;
    call.voxel_stride = volume.voxel_stride;
    call.output_activation = c.output_activation();
    call.compares = objective != nullptr;
    if (objective) call.loss = static_cast<Loss>(objective->loss), call.beta = objective->beta;
    call.scale = factor_ ? scale_ : nullptr;
    call.last_scale = factor_ ? scale_ + 2 : nullptr;
    call.losses = losses_;
    call.dy_sums = dy_sums_;
    call.masks = masks_;
    call.dy = dy_;
    call.delta1 = delta1_;
    return call;
  }

  // Whether an output activation has no bound. A new activation without a bound must be added here.
  static bool unbounded(OutputActivation a) { return a == OutputActivation::none || a == OutputActivation::softplus; }
  // Chooses float16's scales. Without an objective, dl/dy is bounded by the gradient's largest magnitude. With one, it is
  // bounded by the loss's largest slope: 1, or for mse twice the largest difference, estimated as 1 plus the target's largest
  // magnitude. Outputs without bounds may exceed this, so they get a smaller scale.
  void choose_scales(const void* volume, const tcam_objective* objective, int64_t count) {
    int read = 0, exponent = scale_exponent;
    float offset = 1.f, factor = 1.f;
    if (!objective) {
      read = largest(volume, p.out_dtype, count);
      offset = 0.f;
    } else if (static_cast<Loss>(objective->loss) == Loss::mse) {
      read = largest(volume, objective->target_dtype, count);
      factor = 2.f;
      if (unbounded(c.output_activation().kind)) exponent = scale_exponent_open;
    }
    c.run(scale_kernel, 1, 1, 0, largest_, read, offset, factor, exponent, 1.f, scale_);
    const int weights = largest(c.weights[p.layers], TCAM_F32, static_cast<int64_t>(n_out()) * c.width(p.layers - 1));
    c.run(scale_kernel, 1, 1, 0, largest_, weights, 0.f, 1.f, 0, 1.f, scale_ + 2);
    c.run(both_scales_kernel, 1, 1, 0, scale_, scale_ + 2, scale_ + 4);
    top_factor_ = scale_ + 1;
    factor_ = scale_ + 4;
  }
  // Reduces an array to the largest magnitudes of a kernel's blocks, in largest_, and returns the number of blocks.
  int largest(const void* values, int dtype, int64_t count) {
    const unsigned grid = static_cast<unsigned>(count < scale_blocks * threads ? ceil_div(count, threads) : scale_blocks);
    c.run(largest_kernel, grid, threads, reduce_bytes, values, dtype, count, largest_);
    return static_cast<int>(grid);
  }

  // Writes the padded, rounded weights: panels_, panel_biases_, last_, last_bias_ and, for gradients, panels_back_.
  template <class T>
  void pad() {
    const int L = p.layers, N = N_;
    c.run(pad_last_kernel, 1, threads, 0, c.weights[L], c.biases[L], c.width(L), c.width(L - 1), N, last_, last_bias_);
    for (int l = 2; l < L; ++l) {
      const int64_t at = l - 2;
      c.run_elements(pad_hidden_kernel<T>, N * N, c.weights[l], nullptr, nullptr, c.biases[l], c.width(l), c.width(l - 1), N,
                     false, panels_ + at * N * N, panel_biases_ + at * N);
      if (!c.backward) continue;
      const bool scaled = l == L - 1 && n_out() == 1;  // by the rows of the last layer, see fused_backward.cuh
      c.run_elements(pad_hidden_kernel<T>, N * N, c.weights[l], scaled ? c.weights[L] : nullptr,
                     scaled && factor_ ? scale_ + 2 : nullptr, nullptr, c.width(l), c.width(l - 1), N, true,
                     panels_back_ + at * N * N, nullptr);
    }
  }
};

}  // namespace tcam
