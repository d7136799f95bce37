// The layers above the first on tensor cores: the kernels of fused_forward.cuh and fused_backward.cuh over maps that the class
// which it stands on (a grid's slabs, a wave of points) has made.
#pragma once
#include <stdio.h>

#include "fused_backward.cuh"
#include "fused_forward.cuh"
#include "fused_operands.cuh"
#include "fused_sums.cuh"

namespace tcam {

// Whether the fused kernels take a problem, by its shape and options.
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
  if (p.width[L] > fused_most_out) return {"there are %lld outputs, and they take up to %lld", p.width[L], fused_most_out};
  for (int l = 1; l < L; ++l)
    if (p.width[l] > 128) return {"a hidden layer is %lld wide, and they take up to %lld", p.width[l], 128};
  return {};
}

// Base: Planes<float> or what derives from it.
template <class Base>
class FusedMlp : public Base {
 protected:
  using Base::activation, Base::biases_, Base::blocks, Base::check, Base::combine, Base::grad_bias_, Base::grad_weight_,
      Base::output_activation, Base::p, Base::reals, Base::status_, Base::stream_, Base::weights_, Base::width;

 public:
  // Why these kernels do not take the problem on a device: by sizes, before anything is launched.
  Refusal refuses(Output output, const Device& device) {
    device_ = device;
    if (refusal_.why) return refusal_;
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
  // Which kernels those are.
  void describe(Output output, char* text, size_t size) const {
    const char* type = bfloat() ? "bfloat16" : "float16";
    if (output == Output::volume)
      snprintf(text, size, "fused, on tensor cores in %s: %d channels, %d products, blocks of %d x %d warps", type, N_,
               products(), kind_->wi, kind_->wj);
    else
      snprintf(text, size, "fused, on tensor cores in %s: %d channels, %d products, %d launches", type, N_, products(),
               launches(output).count);
  }

 protected:
  template <class... Arguments>
  explicit FusedMlp(Arguments&&... arguments) : Base(static_cast<Arguments&&>(arguments)...) {}

  // One launch of the backward kernel.
  struct Launch {
    int layer;
    bool head;
  };
  struct Launches {
    Launch all[TCAM_MAX_LAYERS];
    int count = 0;
    void add(int layer, bool head) { all[count++] = {layer, head}; }
  };

  Device device_ = {0, 0};
  Refusal refusal_ = {};                    // by the shape
  const FusedForwardKind* kind_ = nullptr;  // set where refuses() was asked of a volume
  int N_ = 0;                               // padded width of the hidden layers; 0: not for these kernels
  int64_t most_blocks_ = 0;
  uint16_t *panels_ = nullptr, *top_ = nullptr;  // W_2 to W_(P+1); diag(w) W_(P+1)
  float *panel_biases_ = nullptr, *last_ = nullptr, *last_bias_ = nullptr;
  uint4* masks_ = nullptr;
  uint16_t* delta1_ = nullptr;
  float *dy_ = nullptr, *largest_ = nullptr, *scale_ = nullptr;
  // Of float16 (null: none): scale_[0] multiplies dl/dy, scale_[2] the last layer's weights on the way back; these undo the
  // first, and both.
  const float *top_factor_ = nullptr, *factor_ = nullptr;
  float *sums_[TCAM_MAX_LAYERS + 1] = {}, *row_sums_[TCAM_MAX_LAYERS + 1] = {};
  double *losses_ = nullptr, *dy_sums_ = nullptr, *dy_total_ = nullptr;

  int products() const { return p.layers - 2; }
  int n_out() const { return width(p.layers); }
  bool bfloat() const { return p.compute == TCAM_BF16; }

  // Sets refusal_ or N_.
  void look_at_shape() {
    refusal_ = fused_refusal(p);
    if (refusal_.why) return;
    N_ = 64;
    for (int l = 1; l < p.layers; ++l) N_ = p.width[l] > 64 ? 128 : N_;
  }

  // With one output the head computes the gradient of layer P+1 too; with more, that of the last layer.
  Launches launches(Output output) const {
    Launches all;
    if (output == Output::volume) return all;
    const int first = n_out() == 1 && output == Output::gradients ? p.layers - 1 : p.layers;
    all.add(first, true);
    for (int l = first - 1; l >= 2 && output == Output::gradients; --l)
      if (p.grad_decoder || l == 2) all.add(l, false);
    return all;
  }
  // What a block of the largest launch takes.
  size_t shared_bytes(Output output) const {
    const Launches all = launches(output);
    size_t most = 0;
    for (int e = 0; e < all.count; ++e) {
      FusedBackward call = {};
      call.products = products();
      call.layer = all.all[e].layer;
      call.head = all.all[e].head;
      const size_t bytes = fused_backward_bytes(call, N_);
      most = bytes > most ? bytes : most;
    }
    return most;
  }

  // `steps` of the backward kernel, and `voxels`, at once.
  void carve_mlp(Carver& ws, bool backward, int64_t steps, int64_t voxels) {
    const int64_t N = N_, P = products();
    auto halves = [&](int64_t count) { return reinterpret_cast<uint16_t*>(ws.take(count * 2)); };
    auto floats = [&](int64_t count) { return reals(ws, count); };
    auto doubles = [&](int64_t count) { return reinterpret_cast<double*>(ws.take(count * 8)); };
    const int64_t chain_threads = fused_backward_chain_threads;  // a voxel each
    panels_ = halves(P * N * N);
    panel_biases_ = floats(P * N);
    last_ = floats(fused_most_out * N);
    last_bias_ = floats(fused_most_out);
    losses_ = doubles(fused_most_blocks * chain_threads);
    dy_sums_ = doubles(fused_most_blocks * chain_threads);
    if (!backward) return;
    top_ = halves(N * N);
    masks_ = reinterpret_cast<uint4*>(ws.take(P * steps * chain_threads * 16));
    dy_ = floats(steps * chain_threads * n_out());
    delta1_ = halves(voxels * N);
    largest_ = floats(scale_blocks);
    scale_ = floats(5);
  }
  // Partial sums of the gradients: between Base's begin_partials and end_partials.
  void carve_sums(Carver& ws, int64_t steps) {
    most_blocks_ = steps < fused_most_blocks ? steps : fused_most_blocks;
    for (int l = 2; l <= p.layers; ++l) {
      sums_[l] = reals(ws, most_blocks_ * N_ * N_);
      row_sums_[l] = reals(ws, most_blocks_ * 2 * N_);
      if (l == p.layers - 1 && n_out() == 1) break;
    }
    dy_total_ = reinterpret_cast<double*>(ws.take(8));
  }

  static bool unbounded(OutputActivation a) {
    return a == OutputActivation::none || a == OutputActivation::softplus || a == OutputActivation::trunc_exp;
  }
  // Chooses the scales of float16: for a gradient from its largest magnitude; for an objective from its largest slope, which is
  // 1 or, of mse, twice the largest difference. (An output without bounds is taken to be no larger than the target or 1.)
  void look_at(const void* volume, const tcam_objective* objective) override {
    if (p.compute != TCAM_F16) return;
    const int64_t voxels = this->places() * n_out();
    int read = 0, exponent = scale_exponent;
    float offset = 1.f, factor = 1.f;
    if (!objective) {
      read = largest(volume, p.out_dtype, voxels);
      offset = 0.f;
    } else if (static_cast<Loss>(objective->loss) == Loss::mse) {
      read = largest(volume, objective->target_dtype, voxels);
      factor = 2.f;
      if (unbounded(output_activation().kind)) exponent = scale_exponent_open;
    }
    check(launch(scale_kernel, 1, 1, 0, stream_, largest_, read, offset, factor, exponent, 1.f, scale_));
    const int weights = largest(weights_[p.layers], TCAM_F32, static_cast<int64_t>(n_out()) * width(p.layers - 1));
    check(launch(scale_kernel, 1, 1, 0, stream_, largest_, weights, 0.f, 1.f, 0, 1.f, scale_ + 2));
    check(launch(both_scales_kernel, 1, 1, 0, stream_, scale_, scale_ + 2, scale_ + 4));
    top_factor_ = scale_ + 1;
    factor_ = scale_ + 4;
  }
  // How many numbers of largest_ hold the largest of an array.
  int largest(const void* values, int dtype, int64_t count) {
    const unsigned grid = static_cast<unsigned>(count < scale_blocks * threads ? ceil_div(count, threads) : scale_blocks);
    check(launch(largest_kernel, grid, threads, reduce_bytes, stream_, values, dtype, count, largest_));
    return static_cast<int>(grid);
  }

  // The layers over maps, to the output at `at` (whose voxels are neighbours) or with an objective to `loss`; backward also to
  // delta1_ and the partial sums.
  template <class T>
  void run(const FusedMaps& maps, void* at, int dtype, int64_t channel_stride, int64_t voxel_stride,
           const tcam_objective* objective, double* loss, bool backward) {
    const int64_t N = N_;
    const Launches all = launches(backward ? Output::gradients : objective ? Output::losses : Output::volume);
    if (!all.count) {
      const FusedForward call = {maps, panels_, panel_biases_, last_, last_bias_, n_out(), output_activation(),
                                 at,   dtype,   channel_stride};
      check(T::dtype == TCAM_BF16 ? fused_forward_bfloat16(call, *kind_, products(), device_, stream_)
                                  : fused_forward_float16(call, *kind_, products(), device_, stream_));
      return;
    }
    FusedBackward call = {};
    call.maps = maps;
    call.weights = panels_;
    call.top = n_out() == 1 ? top_ : panels_ + static_cast<int64_t>(products() - 1) * N * N;
    call.biases = panel_biases_;
    call.last = last_;
    call.last_bias = last_bias_;
    call.products = products();
    call.n_out = n_out();
    call.weighted = backward && p.grad_decoder;
    call.volume = at;
    call.dtype = dtype;
    call.channel_stride = channel_stride;
    call.voxel_stride = voxel_stride;
    call.output_activation = output_activation();
    call.compares = objective != nullptr;
    if (objective) call.loss = static_cast<Loss>(objective->loss), call.beta = objective->beta;
    call.scale = factor_ ? scale_ : nullptr;
    call.last_scale = factor_ ? scale_ + 2 : nullptr;
    call.losses = losses_;
    call.dy_sums = dy_sums_;
    call.masks = masks_;
    call.dy = dy_;
    call.delta1 = delta1_;
    const int64_t steps = fused_backward_steps(maps);
    const int64_t most = device_.processors < fused_most_blocks ? device_.processors : fused_most_blocks;
    const int grid = static_cast<int>(steps < most ? steps : most);
    for (int e = 0; e < all.count; ++e) {
      call.layer = all.all[e].layer;
      call.head = all.all[e].head;
      call.sums = sums_[call.layer];
      call.row_sums = row_sums_[call.layer];
      check(T::dtype == TCAM_BF16 ? fused_backward_bfloat16(call, N_, grid, stream_)
                                  : fused_backward_float16(call, N_, grid, stream_));
      if (!call.head) continue;
      if (objective) add_total(losses_, grid * fused_backward_chain_threads, loss);
      if (call.weighted && n_out() == 1) add_total(dy_sums_, grid * fused_backward_chain_threads, dy_total_);
    }
  }

  void add_total(const double* values, int count, double* total) {
    check(launch(add_total_kernel, 1, threads, reduce_bytes, stream_, values, count, total));
  }

  template <class T>
  void pad(bool backward) {
    const int L = p.layers, N = N_;
    for (int l = 2; l < L; ++l)
      check(launch(pad_hidden_kernel<T>, blocks(ceil_div(N * N, threads)), threads, 0, stream_, weights_[l], nullptr, nullptr,
                   biases_[l], width(l), width(l - 1), N, panels_ + static_cast<int64_t>(l - 2) * N * N,
                   panel_biases_ + (l - 2) * N));
    check(
        launch(pad_last_kernel, 1, threads, 0, stream_, weights_[L], biases_[L], width(L), width(L - 1), N, last_, last_bias_));
    if (backward && n_out() == 1)
      check(launch(pad_hidden_kernel<T>, blocks(ceil_div(N * N, threads)), threads, 0, stream_, weights_[L - 1], weights_[L],
                   factor_ ? scale_ + 2 : nullptr, nullptr, width(L - 1), width(L - 2), N, top_, nullptr));
  }

  void write_gradients() override {
    const int64_t N = N_;
    const int L = p.layers, top = L - 1;
    const bool one = n_out() == 1;
    auto sums = [&](int l) { return Partials<float>{sums_[l], most_blocks_, N * N, N}; };
    auto row_sums = [&](int l) { return Partials<float>{row_sums_[l], most_blocks_ * 2, N, N}; };
    for (int l = 2; l <= (one ? L - 2 : L); ++l) {
      const float* factor = l == L ? top_factor_ : factor_;
      combine(sums(l), width(l), width(l - 1), factor, grad_weight_[l], width(l - 1));
      if (grad_bias_[l]) combine(row_sums(l), 1, width(l), factor, grad_bias_[l], width(l));
    }
    if (!one) return;
    const TopLayers call = {sums(top),
                            row_sums(top),
                            panels_ + (products() - 1) * N * N,
                            panel_biases_ + (products() - 1) * N,
                            last_,
                            N_,
                            width(top - 1),
                            top_factor_,
                            grad_weight_[top],
                            grad_bias_[top],
                            grad_weight_[L]};
    auto kernel = bfloat() ? combine_top_kernel<ptx::BFloat16> : combine_top_kernel<ptx::Float16>;
    check(launch(kernel, static_cast<unsigned>(width(top)), threads, reduce_bytes, stream_, call));
    if (grad_bias_[L]) check(launch(write_scalar_kernel, 1, 1, 0, stream_, dy_total_, top_factor_, grad_bias_[L]));
  }
};

}  // namespace tcam
