// decode_grid's fast road: the tensor-core kernels of fused_forward.h and fused_backward.h, over slabs of i whose maps, masks
// and delta_1 fit a fixed workspace; what is around them is here.
#pragma once
#include "fused_backward.h"
#include "fused_forward.h"
#include "planes.h"

namespace tcam {

constexpr int64_t slab_bytes_forward = 256ll << 20, slab_bytes_backward = 1152ll << 20;
constexpr int sum_tile = 16;  // voxels of j and of k that a block of delta_sums_kernel owns

// ---- operands -------------------------------------------------------------------------------

// map (nx, ny, padded) = the plane at every (x, y), with bias, rounded; zero in the padding. A warp takes an (x, y).
template <class T>
__global__ void __launch_bounds__(threads)
    map_kernel(const float* plane, int columns, int n, int padded, const Tap<float>* rows, const Tap<float>* cols, int64_t nx,
               int64_t ny, const float* bias, uint16_t* map) {
  const int lane = threadIdx.x % 32;
  for (int64_t v = blockIdx.x * static_cast<int64_t>(warps) + threadIdx.x / 32; v < nx * ny;
       v += static_cast<int64_t>(gridDim.x) * warps) {
    const Tap<float> x = rows[v / ny], y = cols[v % ny];
    for (int c = lane; c < padded; c += 32) {
      const float sum = c < n ? bilinear(plane, columns, n, c, x, y) + (bias ? bias[c] : 0.f) : 0.f;
      map[v * padded + c] = T::round(sum);
    }
  }
}

// weight (rows, columns), its rows times row_factors and *scale (null: 1), and bias (rows) to (padded_rows, padded) and
// (padded_rows), zero beyond.
template <class Out, class Round>
TCAM_DEVICE void pad_matrix(const float* weight, const float* row_factors, const float* scale, const float* bias, int rows,
                            int columns, int padded_rows, int padded, Out* to_weight, float* to_bias, Round round) {
  for (int e = blockIdx.x * threads + threadIdx.x; e < padded_rows * padded; e += gridDim.x * threads) {
    const int r = e / padded, c = e % padded;
    const float w = r < rows && c < columns ? weight[static_cast<int64_t>(r) * columns + c] : 0.f;
    to_weight[e] = round(row_factors && r < rows ? w * (row_factors[r] * (scale ? *scale : 1.f)) : w);
    if (c == 0 && to_bias) to_bias[r] = bias && r < rows ? bias[r] : 0.f;
  }
}
template <class T>
__global__ void __launch_bounds__(threads)
    pad_hidden_kernel(const float* weight, const float* row_factors, const float* scale, const float* bias, int rows,
                      int columns, int padded, uint16_t* to_weight, float* to_bias) {
  pad_matrix(weight, row_factors, scale, bias, rows, columns, padded, padded, to_weight, to_bias,
             [](float x) { return T::round(x); });
}
static __global__ void __launch_bounds__(threads) pad_last_kernel(const float* weight, const float* bias, int rows, int columns,
                                                                  int padded, float* to_weight, float* to_bias) {
  pad_matrix(weight, nullptr, nullptr, bias, rows, columns, rows, padded, to_weight, to_bias, [](float x) { return x; });
}

// ---- scales for float16 -------------------------------------------------------------------------

constexpr int scale_blocks = 1024;
constexpr int scale_exponent = 10;  // of the largest dl/dy: room for 6 doublings above, for 24 halvings below

// The largest magnitude of each block's numbers; one that is not finite counts as infinity.
static __global__ void __launch_bounds__(threads) largest_kernel(const void* values, int dtype, int64_t count, float* largest) {
  Shared shared;
  float* all = shared.take<float>(threads);
  float most = 0.f;
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    const float x = fabsf(Elements<float>::read(values, dtype, e));
    most = x <= 3.4028234663852886e38f ? fmaxf(most, x) : INFINITY;
  }
  all[threadIdx.x] = most;
  __syncthreads();
  for (int half = threads / 2; half; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) all[threadIdx.x] = fmaxf(all[threadIdx.x], all[threadIdx.x + half]);
    __syncthreads();
  }
  if (threadIdx.x == 0) largest[blockIdx.x] = all[0];
}

// scale[0]: the power of two that brings factor * (offset + the largest magnitude) to 2^exponent or next below; scale[1]: its
// inverse. 1 where there is none.
static __global__ void scale_kernel(const float* largest, int blocks, float offset, float factor, int exponent, float* scale) {
  float most = 0.f;
  for (int b = 0; b < blocks; ++b) most = fmaxf(most, largest[b]);
  most = factor * (offset + most);
  int own = exponent;
  if (most > 0.f && most <= 3.4028234663852886e38f) frexpf(most, &own);
  const int by = own - exponent < -100 ? -100 : own - exponent > 100 ? 100 : own - exponent;
  scale[0] = ldexpf(1.f, -by);
  scale[1] = ldexpf(1.f, by);
}
// both[1] = a[1] b[1]
static __global__ void both_scales_kernel(const float* a, const float* b, float* both) { *both = a[1] * b[1]; }

// ---- from delta_1 to the maps -----------------------------------------------------------------

// Of a slab: db[j, k] += sum over i of delta_1; partial_a[i, j, tile of k] and partial_g[i, tile of j, k]: the sums over the
// tile. A block owns a tile of (j, k) and walks i. A thread has 8 channels, and half of the tile's j at one k; then half of its
// k at one j. The halves meet in shared memory. Loads are not guarded, so that eight of them are on their way at once.
template <class T, int N>
__global__ void __launch_bounds__(sum_tile* N / 4)
    delta_sums_kernel(const uint16_t* __restrict__ delta1, int ni, int nj, int nk, int n, const float* factor,
                      float* __restrict__ db, float* __restrict__ partial_a, float* __restrict__ partial_g) {
  constexpr int lanes = N / 8, own = sum_tile / 2;
  Shared shared;
  float* other = shared.take<float>(2 * 2 * sum_tile * N);  // of the upper halves: twice, (for g, for a), line, channel
  const int at = threadIdx.x % lanes * 8, line = threadIdx.x / lanes % sum_tile, upper = threadIdx.x / (lanes * sum_tile);
  const int tk = blockIdx.x, tj = blockIdx.y, tiles_k = gridDim.x, tiles_j = gridDim.y;
  const int j0 = tj * sum_tile, k0 = tk * sum_tile;
  const float f = factor ? *factor : 1.f;
  float sum_b[own][8] = {};
  // use(q, delta_1) at `own` voxels, (dj, dk) apart; zero beyond the volume.
  auto each = [&](int i, int j, int k, int dj, int dk, auto use) {
    uint4 raw[own];
#pragma unroll
    for (int q = 0; q < own; ++q) {
      const int jq = j + q * dj, kq = k + q * dk;
      const size_t voxel = (static_cast<size_t>(i) * nj + (jq < nj ? jq : nj - 1)) * nk + (kq < nk ? kq : nk - 1);
      raw[q] = *reinterpret_cast<const uint4*>(delta1 + voxel * N + at);
    }
#pragma unroll
    for (int q = 0; q < own; ++q) {
      const bool inside = j + q * dj < nj && k + q * dk < nk;
      const uint32_t all[4] = {raw[q].x, raw[q].y, raw[q].z, raw[q].w};
      float v[8];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        v[2 * c] = inside ? T::widen(static_cast<uint16_t>(all[c])) : 0.f;
        v[2 * c + 1] = inside ? T::widen(static_cast<uint16_t>(all[c] >> 16)) : 0.f;
      }
      use(q, v);
    }
  };
  for (int i = 0; i < ni; ++i) {
    float sum_g[8] = {}, sum_a[8] = {};
    each(i, j0 + upper * own, k0 + line, 1, 0, [&](int q, const float (&v)[8]) {
#pragma unroll
      for (int c = 0; c < 8; ++c) sum_b[q][c] += v[c], sum_g[c] += v[c];
    });
    each(i, j0 + line, k0 + upper * own, 0, 1, [&](int, const float (&v)[8]) {
#pragma unroll
      for (int c = 0; c < 8; ++c) sum_a[c] += v[c];
    });
    float* const g_other = other + ((i & 1) * 2 * sum_tile + line) * N + at;
    float* const a_other = g_other + sum_tile * N;
    if (upper)
#pragma unroll
      for (int c = 0; c < 8; ++c) g_other[c] = sum_g[c], a_other[c] = sum_a[c];
    __syncthreads();  // and the halves of step i - 1 have been read
    if (upper) continue;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const int channel = delta1_column(at + c);
      if (channel < n && k0 + line < nk)
        partial_g[((static_cast<size_t>(i) * tiles_j + tj) * nk + k0 + line) * n + channel] = (sum_g[c] + g_other[c]) * f;
      if (channel < n && j0 + line < nj)
        partial_a[((static_cast<size_t>(i) * nj + j0 + line) * tiles_k + tk) * n + channel] = (sum_a[c] + a_other[c]) * f;
    }
  }
#pragma unroll
  for (int q = 0; q < own; ++q) {
    const int j = j0 + upper * own + q;
    if (j >= nj || k0 + line >= nk) continue;
    float* const to = db + (static_cast<size_t>(j) * nk + k0 + line) * n;
    float before[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) before[c] = to[delta1_column(at + c) < n ? delta1_column(at + c) : 0];
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (delta1_column(at + c) < n) to[delta1_column(at + c)] = before[c] + sum_b[q][c] * f;
  }
}

// ---- the gradients of the layers at the top -------------------------------------------------------

struct TopLayers {
  Partials<float> sums, row_sums;  // of dW_(P+1) and db_(P+1) without the factor w of the row
  const uint16_t* weight;          // W_(P+1) as the kernel multiplied it, rows `pitch` apart
  const float *bias, *last;        // b_(P+1); w, the last layer's weights, of its one output
  int pitch, rows, columns;
  const float* factor;
  float *grad_weight, *grad_bias, *grad_last;
};

// dW_r = w_r S_r, db_r = w_r s_r and, because h_r = mask_r (W_r h + b_r), dw_r = sum of dy h_r = W_r . S_r + b_r s_r: the
// voxels of the last layer need not be walked again. A block takes a row.
template <class T>
__global__ void __launch_bounds__(threads) combine_top_kernel(TopLayers p) {
  Shared shared;
  float* dots = shared.take<float>(threads);
  const int r = blockIdx.x;
  const float f = p.factor ? *p.factor : 1.f, w = p.last[r];
  float dot = 0.f;
  for (int c = threadIdx.x; c < p.columns; c += threads) {
    float sum = 0.f;
    for (int64_t s = 0; s < p.sums.splits; ++s) sum += p.sums.data[s * p.sums.split_pitch + r * p.sums.row_pitch + c];
    p.grad_weight[static_cast<int64_t>(r) * p.columns + c] = sum * w * f;
    dot += sum * T::widen(p.weight[r * p.pitch + c]);
  }
  dots[threadIdx.x] = dot;
  __syncthreads();
  for (int half = threads / 2; half; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) dots[threadIdx.x] += dots[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x) return;
  float sum = 0.f;
  for (int64_t s = 0; s < p.row_sums.splits; ++s) sum += p.row_sums.data[s * p.row_sums.split_pitch + r];
  if (p.grad_bias) p.grad_bias[r] = sum * w * f;
  p.grad_last[r] = (dots[0] + sum * p.bias[r]) * f;
}

static __global__ void write_scalar_kernel(const double* value, const float* factor, float* out) {
  *out = static_cast<float>(*value * (factor ? static_cast<double>(*factor) : 1.));
}

// ---- the call ----------------------------------------------------------------------------------

// What a call is for.
enum class Output { volume, losses, gradients };

class Fused : public Planes<float> {
 public:
  Fused(const tcam_decode_grid& problem, bool backward, void* workspace, cudaStream_t stream) : Planes(problem, stream) {
    N_ = choose_width();
    if (!N_) return;
    Carver ws(workspace);
    carve_planes(ws, backward);
    carve(ws, backward, workspace);
    bytes_ = ws.used();
  }

  // Whether this road takes the problem: its shape, and the shared memory of the current device.
  bool serves(Output output) {
    if (!N_) return false;
    int id = 0;
    check(cudaGetDevice(&id));
    check(cudaDeviceGetAttribute(&device_.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, id));
    check(cudaDeviceGetAttribute(&device_.processors, cudaDevAttrMultiProcessorCount, id));
    if (status_) return true;  // and fails
    return output == Output::volume ? fused_forward_fits(N_, products(), device_) : fits(launches(output));
  }

 private:
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
  int N_ = 0;  // padded width of the hidden layers; 0: not for this road
  int64_t slab_ = 0, most_blocks_ = 0;
  uint16_t *maps_[3] = {}, *panels_ = nullptr,
           *top_ = nullptr;  // A and G of a slab of i, B of the volume; weights; diag(w) W_(P+1)
  float *panel_biases_ = nullptr, *last_ = nullptr, *last_bias_ = nullptr;
  uint4* masks_ = nullptr;
  uint16_t* delta1_ = nullptr;
  float *dy_ = nullptr, *partial_a_ = nullptr, *partial_g_ = nullptr, *largest_ = nullptr, *scale_ = nullptr;
  // Of float16 (null: none): scale_[0] multiplies dl/dy, scale_[2] the last layer's weights on the way back; these undo the
  // first, and both.
  const float *top_factor_ = nullptr, *factor_ = nullptr;
  float* grad_top_[2] = {};  // of the layer below the last: its weight, its bias
  float *sums_[TCAM_MAX_LAYERS + 1] = {}, *row_sums_[TCAM_MAX_LAYERS + 1] = {};
  double *losses_ = nullptr, *dy_sums_ = nullptr, *dy_total_ = nullptr;

  int products() const { return p.layers - 2; }
  int n_out() const { return width(p.layers); }
  bool bfloat() const { return p.compute == TCAM_BF16; }

  int choose_width() const {
    const int L = p.layers;
    if (p.dtype != TCAM_F32 || (p.compute != TCAM_BF16 && p.compute != TCAM_F16)) return 0;
    if (static_cast<Activation>(p.activation) != Activation::relu || L < 3 || L - 2 > fused_most_products ||
        p.width[L] > fused_most_out)
      return 0;
    int64_t widest = 0;
    for (int l = 1; l < L; ++l) widest = p.width[l] > widest ? p.width[l] : widest;
    if (n_[0] > INT32_MAX / n_[1] || n_[0] * n_[1] > INT32_MAX / ceil_div(n_[2], 32)) return 0;  // steps are counted in int
    return widest <= 64 ? 64 : widest <= 128 ? 128 : 0;
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
  bool fits(const Launches& all) const {
    for (int e = 0; e < all.count; ++e) {
      FusedBackward call = {};
      call.products = products();
      call.layer = all.all[e].layer;
      call.head = all.all[e].head;
      if (!fused_backward_fits(call, N_, device_)) return false;
    }
    return true;
  }

  FusedMaps slab_maps(int64_t ni) const {
    return {maps_[0], maps_[1], maps_[2], static_cast<int>(ni), static_cast<int>(n_[1]), static_cast<int>(n_[2])};
  }
  // Steps of the backward kernel in `ni` planes.
  int64_t steps(int64_t ni) const { return fused_backward_steps(slab_maps(ni)); }
  int64_t tiles(int axis) const { return ceil_div(n_[axis], sum_tile); }

  void carve(Carver& ws, bool backward, void* workspace) {
    const int64_t N = N_, P = products(), voxels = n_[1] * n_[2];
    auto halves = [&](int64_t count) { return reinterpret_cast<uint16_t*>(ws.take(count * 2)); };
    auto floats = [&](int64_t count) { return reals(ws, count); };
    auto doubles = [&](int64_t count) { return reinterpret_cast<double*>(ws.take(count * 8)); };
    const int64_t chain_threads = fused_backward_chain_threads, step_voxels = chain_threads;
    int64_t each = (n_[1] + n_[2]) * N * 2, budget = slab_bytes_forward;
    if (backward) {  // a step is a voxel a thread; steps round j up to 2 and k to 32
      const int64_t padded = steps(2) * step_voxels / 2;
      each += padded * (16 * P + 4 * n_out()) + voxels * N * 2 + (n_[1] * tiles(2) + tiles(1) * n_[2]) * width(1) * 4;
      budget = slab_bytes_backward;
    }
    slab_ = budget / each;
    if (backward && p.tile > 0 && slab_ > p.tile / voxels) slab_ = p.tile / voxels;
    if (slab_ > 2) slab_ = slab_ / 2 * 2;
    if (slab_ < 2) slab_ = 2;
    if (slab_ > n_[0]) slab_ = n_[0];

    maps_[0] = halves(slab_ * n_[1] * N);
    maps_[1] = halves(n_[1] * n_[2] * N);
    maps_[2] = halves(slab_ * n_[2] * N);
    panels_ = halves(P * N * N);
    panel_biases_ = floats(P * N);
    last_ = floats(fused_most_out * N);
    last_bias_ = floats(fused_most_out);
    losses_ = doubles(fused_most_blocks * chain_threads);
    dy_sums_ = doubles(fused_most_blocks * chain_threads);
    if (!backward) return;
    top_ = halves(N * N);
    masks_ = reinterpret_cast<uint4*>(ws.take(P * steps(slab_) * chain_threads * 16));
    dy_ = floats(steps(slab_) * step_voxels * n_out());
    delta1_ = halves(slab_ * voxels * N);
    partial_a_ = floats(slab_ * n_[1] * tiles(2) * width(1));
    partial_g_ = floats(slab_ * tiles(1) * n_[2] * width(1));
    largest_ = floats(scale_blocks);
    scale_ = floats(5);
    if (!p.grad_decoder) return;
    most_blocks_ = steps(slab_) < fused_most_blocks ? steps(slab_) : fused_most_blocks;
    const int64_t begin = begin_partials(ws);
    for (int l = 2; l <= p.layers; ++l) {
      sums_[l] = floats(most_blocks_ * N * N);
      row_sums_[l] = floats(most_blocks_ * 2 * N);
      if (l == p.layers - 1 && n_out() == 1) break;
    }
    dy_total_ = doubles(1);
    end_partials(ws, workspace, begin);
  }

  // Chooses the scales of float16: for a gradient from its largest magnitude; for an objective from a bound of its slope.
  void look_at(const void* volume, const tcam_objective* objective) override {
    if (p.compute != TCAM_F16) return;
    const bool mse = objective && static_cast<Loss>(objective->loss) == Loss::mse;
    const int read = objective && !mse ? 0
                                       : largest(volume, objective ? objective->target_dtype : p.out_dtype,
                                                 p.batch * n_out() * n_[0] * n_[1] * n_[2]);
    check(
        launch(scale_kernel, 1, 1, 0, stream_, largest_, read, objective ? 1.f : 0.f, mse ? 2.f : 1.f, scale_exponent, scale_));
    const int weights = largest(weights_[p.layers], TCAM_F32, static_cast<int64_t>(n_out()) * width(p.layers - 1));
    check(launch(scale_kernel, 1, 1, 0, stream_, largest_, weights, 0.f, 1.f, 0, scale_ + 2));
    check(launch(both_scales_kernel, 1, 1, 0, stream_, scale_, scale_ + 2, scale_ + 4));
    top_factor_ = scale_ + 1;
    factor_ = scale_ + 4;
  }
  // How many numbers of largest_ hold the largest of an array.
  int largest(const void* values, int dtype, int64_t count) {
    const unsigned grid = static_cast<unsigned>(count < scale_blocks * threads ? ceil_div(count, threads) : scale_blocks);
    check(launch(largest_kernel, grid, threads, threads * sizeof(float) + 16, stream_, values, dtype, count, largest_));
    return static_cast<int>(grid);
  }

  void walk(int64_t object, void* volume, const tcam_objective* objective, double* losses, bool backward) override {
    if (bfloat())
      walk_in<ptx::BFloat16>(object, volume, objective, losses, backward);
    else
      walk_in<ptx::Float16>(object, volume, objective, losses, backward);
  }

  template <class T>
  void walk_in(int64_t object, void* volume, const tcam_objective* objective, double* losses, bool backward) {
    const int L = p.layers, N = N_, dtype = objective ? objective->target_dtype : p.out_dtype;
    if (object == 0) pad<T>(backward);
    map<T>(1, taps_[1], n_[1], nullptr);
    const int64_t voxels = n_[0] * n_[1] * n_[2];
    const Launches all = launches(backward ? Output::gradients : objective ? Output::losses : Output::volume);
    for (int64_t i0 = 0; i0 < n_[0] && !status_; i0 += slab_) {
      const int64_t ni = n_[0] - i0 < slab_ ? n_[0] - i0 : slab_;
      map<T>(0, taps_[0] + i0, ni, biases_[1]);
      map<T>(2, taps_[0] + i0, ni, nullptr);
      char* at = static_cast<char*>(volume) + (object * width(L) * voxels + i0 * n_[1] * n_[2]) * dtype_bytes(dtype);
      const OutputActivation output = static_cast<OutputActivation>(p.output_activation);
      if (!all.count) {
        const FusedForward call = {slab_maps(ni), panels_, panel_biases_, last_, last_bias_, n_out(),
                                   output,        at,      dtype,         voxels};
        check(T::dtype == TCAM_BF16 ? fused_forward_bfloat16(call, N, products(), device_, stream_)
                                    : fused_forward_float16(call, N, products(), device_, stream_));
        continue;
      }
      FusedBackward call = {};
      call.maps = slab_maps(ni);
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
      call.channel_stride = voxels;
      call.output_activation = output;
      call.compares = objective != nullptr;
      if (objective) call.loss = static_cast<Loss>(objective->loss), call.beta = objective->beta;
      call.scale = factor_ ? scale_ : nullptr;
      call.last_scale = factor_ ? scale_ + 2 : nullptr;
      call.losses = losses_;
      call.dy_sums = dy_sums_;
      call.masks = masks_;
      call.dy = dy_;
      call.delta1 = delta1_;
      const int64_t most = device_.processors < fused_most_blocks ? device_.processors : fused_most_blocks;
      const int grid = static_cast<int>(steps(ni) < most ? steps(ni) : most);
      for (int e = 0; e < all.count; ++e) {
        call.layer = all.all[e].layer;
        call.head = all.all[e].head;
        call.sums = sums_[call.layer];
        call.row_sums = row_sums_[call.layer];
        check(T::dtype == TCAM_BF16 ? fused_backward_bfloat16(call, N, grid, stream_)
                                    : fused_backward_float16(call, N, grid, stream_));
        if (!call.head) continue;
        if (objective) add_total(losses_, grid * fused_backward_chain_threads, losses + object);
        if (call.weighted && n_out() == 1) add_total(dy_sums_, grid * fused_backward_chain_threads, dy_total_);
      }
      if (backward) sum_delta1<T>(i0, ni);
    }
  }

  void add_total(const double* values, int count, double* total) {
    check(launch(add_total_kernel, 1, threads, threads * sizeof(double), stream_, values, count, total));
  }

  template <class T>
  void sum_delta1(int64_t i0, int64_t ni) {
    const int64_t nj = n_[1], nk = n_[2], n1 = width(1);
    const dim3 grid(static_cast<unsigned>(tiles(2)), static_cast<unsigned>(tiles(1)));
    auto kernel = N_ == 64 ? delta_sums_kernel<T, 64> : delta_sums_kernel<T, 128>;
    check(launch(kernel, grid, static_cast<unsigned>(sum_tile * N_ / 4), 4 * sum_tile * N_ * sizeof(float) + 16, stream_,
                 delta1_, static_cast<int>(ni), static_cast<int>(nj), static_cast<int>(nk), width(1), factor_, db_, partial_a_,
                 partial_g_));
    add_axis_sum(partial_a_, da_ + i0 * nj * n1, nj, ni, nj, tiles(2), nj * tiles(2), tiles(2), 1);
    add_axis_sum(partial_g_, dg_ + i0 * nk * n1, nk, ni, nk, tiles(1), tiles(1) * nk, 1, nk);
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

  // Map q (0: A, 1: B, 2: G) at `nx` rows.
  template <class T>
  void map(int q, const Tap<float>* rows, int64_t nx, const float* bias) {
    const int columns_axis = q == 0 ? 1 : 2;
    check(launch(map_kernel<T>, blocks(ceil_div(nx * n_[columns_axis], warps)), threads, 0, stream_, projected_[q],
                 static_cast<int>(columns_[q]), width(1), N_, rows, taps_[columns_axis], nx, n_[columns_axis], bias, maps_[q]));
  }

  void write_gradients(int l, float* weight, float* bias) override {
    const int64_t N = N_;
    const Partials<float> sums = {sums_[l], most_blocks_, N * N, N}, row_sums = {row_sums_[l], most_blocks_ * 2, N, N};
    const bool one = n_out() == 1;
    if (one && l == p.layers - 1) {
      grad_top_[0] = weight, grad_top_[1] = bias;  // written with the last layer's
      return;
    }
    if (!one || l < p.layers) {
      const float* factor = l == p.layers ? top_factor_ : factor_;
      combine(sums, width(l), width(l - 1), factor, weight, width(l - 1));
      if (bias) combine(row_sums, 1, width(l), factor, bias, width(l));
      return;
    }
    const int top = l - 1;
    const Partials<float> top_sums = {sums_[top], most_blocks_, N * N, N};
    const Partials<float> top_row_sums = {row_sums_[top], most_blocks_ * 2, N, N};
    const TopLayers call = {top_sums,
                            top_row_sums,
                            panels_ + static_cast<int64_t>(products() - 1) * N * N,
                            panel_biases_ + (products() - 1) * N,
                            last_,
                            N_,
                            width(top),
                            width(top - 1),
                            top_factor_,
                            grad_top_[0],
                            grad_top_[1],
                            weight};
    auto kernel = bfloat() ? combine_top_kernel<ptx::BFloat16> : combine_top_kernel<ptx::Float16>;
    check(launch(kernel, static_cast<unsigned>(width(top)), threads, threads * sizeof(float) + 16, stream_, call));
    if (bias) check(launch(write_scalar_kernel, 1, 1, 0, stream_, dy_total_, top_factor_, bias));
  }
};

}  // namespace tcam
