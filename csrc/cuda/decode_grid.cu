// decode_grid on CUDA. Two roads: the tensor-core kernel of fused_forward.h where it serves the problem, and for every other
// shape one in float32 or float64, layer by layer over regions of the volume:
//
// A region is a box of voxels small enough that its layers fit a fixed workspace. Forward: the first layer is sampled straight
// from the projected planes (kernels.md, fact 1), each hidden layer is one product, the last a dot product a voxel. Backward
// recomputes a region's layers, walks them back, sums the first layer's gradient over k, j and i into maps dA, dB, dG, and adds
// weight gradients to partial sums, one for each fixed range of a region's voxels. Regions follow each other on the stream, so
// every sum has one order and no atomics are needed. The maps go back to texels by a gather, then through W_1 to the planes.
#include "../carver.h"
#include "../maths/activation.h"
#include "../maths/bilinear.h"
#include "../maths/half.h"
#include "../maths/loss.h"
#include "device.h"
#include "fused_forward.h"
#include "gemm.h"
#include "launch.h"

namespace tcam {
namespace {

constexpr int64_t region_voxels = 65536, region_bytes = 256ll << 20;
constexpr int64_t slab_bytes = 256ll << 20;            // of the fused kernel's maps A and G
constexpr int64_t voxel_chunk = 2048;                  // of a region: one partial sum of the weight gradients
constexpr int64_t bias_chunk = 256;                    // the same for bias gradients: a thread walks it alone
constexpr int64_t texel_splits = 32, row_splits = 64;  // partial sums over texels, and over rows of dA
constexpr int threads = 256, warps = threads / 32;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// ---- the axes ----------------------------------------------------------------------------

template <class Real>
struct Tap {
  int lo, hi;
  Real w_lo, w_hi;
};

template <class Real>
__global__ void taps_kernel(int64_t first, int64_t count, int64_t size, int texels, bool align_corners, bool zeros,
                            Tap<Real>* out) {
  for (int64_t x = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; x < count;
       x += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const Taps t = linear_taps(first + x, size, texels, align_corners, zeros);
    out[x] = {t.lo, t.hi, static_cast<Real>(t.w_lo), static_cast<Real>(t.w_hi)};
  }
}

// ---- the first layer -----------------------------------------------------------------------

template <class Real>
struct Sampled {
  const Real* projected[3];  // (rows, columns, n) of the planes xy, yz, xz
  int columns[3];
  const Tap<Real>* taps[3];  // of the axes x, y, z
  const Real* bias;          // null: none
  int n;
};

template <class Real>
TCAM_DEVICE Real bilinear(const Real* plane, int columns, int n, int c, const Tap<Real>& t, const Tap<Real>& u) {
  const Real* lo = plane + static_cast<int64_t>(t.lo) * columns * n + c;
  const Real* hi = plane + static_cast<int64_t>(t.hi) * columns * n + c;
  const int64_t a = static_cast<int64_t>(u.lo) * n, b = static_cast<int64_t>(u.hi) * n;
  return t.w_lo * (u.w_lo * lo[a] + u.w_hi * lo[b]) + t.w_hi * (u.w_lo * hi[a] + u.w_hi * hi[b]);
}

// z_1 (voxels, n): a warp takes a voxel, its lanes the channels.
template <class Real>
__global__ void __launch_bounds__(threads) first_layer_kernel(Sampled<Real> s, Region region, Real* z) {
  const int lane = threadIdx.x % 32;
  for (int v = blockIdx.x * warps + threadIdx.x / 32; v < region.voxels(); v += gridDim.x * warps) {
    const Tap<Real> x = s.taps[0][region.i(v)], y = s.taps[1][region.j(v)], w = s.taps[2][region.k(v)];
    for (int c = lane; c < s.n; c += 32) {
      const Real sum =
          bilinear(s.projected[0], s.columns[0], s.n, c, x, y) +
          (bilinear(s.projected[1], s.columns[1], s.n, c, y, w) + bilinear(s.projected[2], s.columns[2], s.n, c, x, w));
      z[static_cast<int64_t>(v) * s.n + c] = s.bias ? sum + s.bias[c] : sum;
    }
  }
}

// ---- operands of the fused kernel ---------------------------------------------------------------

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

// weight (rows, columns) and bias (rows) to (padded_rows, padded) and (padded_rows), zero beyond.
template <class Out, class Round>
TCAM_DEVICE void pad_matrix(const float* weight, const float* bias, int rows, int columns, int padded_rows, int padded,
                            Out* to_weight, float* to_bias, Round round) {
  for (int e = blockIdx.x * threads + threadIdx.x; e < padded_rows * padded; e += gridDim.x * threads) {
    const int r = e / padded, c = e % padded;
    to_weight[e] = round(r < rows && c < columns ? weight[static_cast<int64_t>(r) * columns + c] : 0.f);
    if (c == 0) to_bias[r] = bias && r < rows ? bias[r] : 0.f;
  }
}
template <class T>
__global__ void __launch_bounds__(threads) pad_hidden_kernel(const float* weight, const float* bias, int rows, int columns,
                                                             int padded, uint16_t* to_weight, float* to_bias) {
  pad_matrix(weight, bias, rows, columns, padded, padded, to_weight, to_bias, [](float x) { return T::round(x); });
}
__global__ void __launch_bounds__(threads) pad_last_kernel(const float* weight, const float* bias, int rows, int columns,
                                                           int padded, float* to_weight, float* to_bias) {
  pad_matrix(weight, bias, rows, columns, rows, padded, to_weight, to_bias, [](float x) { return x; });
}

// ---- operands of the products ----------------------------------------------------------------

// Element (row, column) of a row-major matrix, or of its transpose.
template <class Real>
struct Rows {
  static constexpr bool columns_adjacent = true;
  const Real* data;
  int64_t pitch;
  TCAM_DEVICE Real operator()(int64_t r, int64_t c) const { return data[r * pitch + c]; }
};
template <class Real>
struct Transposed {
  static constexpr bool columns_adjacent = false;
  const Real* data;
  int64_t pitch;
  TCAM_DEVICE Real operator()(int64_t r, int64_t c) const { return data[c * pitch + r]; }
};
// a(z) of a layer, rows are voxels.
template <class Real>
struct Activated {
  static constexpr bool columns_adjacent = true;
  const Real* z;
  int64_t pitch;
  Activation activation;
  TCAM_DEVICE Real operator()(int64_t r, int64_t c) const { return Maths<Scalar<Real>>::value(activation, z[r * pitch + c]); }
};

// a'(z), with the conventions of maths/activation.h.
template <class Real>
TCAM_DEVICE Real slope_at(Activation activation, Real z) {
  using M = Maths<Scalar<Real>>;
  const Real value = M::value(activation, z);
  return slope_from_value(activation) ? M::slope_of_value(activation, value) : M::slope(activation, z, value);
}

template <class Real>
struct WriteRows {
  Real* out;
  int64_t pitch;
  const Real* bias;  // null: none
  TCAM_DEVICE void operator()(int, int64_t r, int c, Real sum) const { out[r * pitch + c] = bias ? sum + bias[c] : sum; }
};
template <class Real>
struct WriteTransposed {
  Real* out;
  int64_t pitch;
  TCAM_DEVICE void operator()(int, int64_t r, int c, Real sum) const { out[c * pitch + r] = sum; }
};
template <class Real>
struct WriteDelta {
  Real* out;
  const Real* z;
  int64_t pitch;
  Activation activation;
  TCAM_DEVICE void operator()(int, int64_t r, int c, Real sum) const {
    out[r * pitch + c] = sum * slope_at(activation, z[r * pitch + c]);
  }
};
template <class Real>
struct AddPartial {
  Real* partials;  // (splits, rows, columns)
  int64_t rows, columns;
  TCAM_DEVICE void operator()(int split, int64_t r, int c, Real sum) const {
    partials[(split * rows + r) * columns + c] += sum;
  }
};

// ---- the last layer --------------------------------------------------------------------------

enum class Finish { write, gradient, compare };

template <class Real>
struct LastLayer {
  const Real *z, *weight, *bias;  // weight (n_out, n_in); null with one layer, where z is the output itself
  int n_in, n_out;
  Activation activation;
  OutputActivation output_activation;
  void* volume;  // of one object: written, or the gradient, or the target
  int dtype;
  int64_t channel_stride;
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
      const int64_t at = o * p.channel_stride + region.in_box(v);
      if (what == Finish::write) {
        Elements<Real>::write(p.volume, p.dtype, at, M::output(p.output_activation, sum));
        continue;
      }
      Real delta = Elements<Real>::read(p.volume, p.dtype, at);
      if (what == Finish::compare) {
        const Real difference = M::output(p.output_activation, sum) - delta;
        total += static_cast<double>(L::value(p.loss, difference, p.beta));
        delta = L::slope(p.loss, difference, p.beta);
      }
      if (p.delta) p.delta[static_cast<int64_t>(v) * p.n_out + o] = delta * M::output_slope(p.output_activation, sum);
    }
    if (what == Finish::compare && lane == 0) p.losses[v] = total;
  }
}

// delta_(L-1) = (delta_L W_L) a'(z_(L-1)): C_out is small, so an element is a few products.
template <class Real>
__global__ void __launch_bounds__(threads) last_delta_kernel(const Real* delta, int n_out, const Real* weight, const Real* z,
                                                             int n, Activation activation, int64_t elements, Real* out) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < elements;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t v = e / n, c = e % n;
    Real sum = 0;
    for (int o = 0; o < n_out; ++o) sum += delta[v * n_out + o] * weight[o * n + c];
    out[e] = sum * slope_at(activation, z[e]);
  }
}

// ---- sums ------------------------------------------------------------------------------------

// map[x, y, :] += sum over s of delta[x*x_step + y*y_step + s*s_step, :], s ascending. A block takes an (x, y).
template <class Real>
__global__ void add_axis_sum_kernel(const Real* delta, int n, int nx, int ny, int ns, int64_t x_step, int64_t y_step,
                                    int64_t s_step, Real* map, int64_t map_pitch) {
  for (int b = blockIdx.x; b < nx * ny; b += gridDim.x) {
    const int x = b / ny, y = b % ny;
    for (int c = threadIdx.x; c < n; c += blockDim.x) {
      Real sum = 0;
      for (int s = 0; s < ns; ++s) sum += delta[(x * x_step + y * y_step + s * s_step) * n + c];
      map[(x * map_pitch + y) * n + c] += sum;
    }
  }
}

// partials[split, :] += sum of the split's rows.
template <class Real>
__global__ void add_column_sums_kernel(const Real* rows, int64_t count, int n, int64_t chunk, Real* partials) {
  const int64_t begin = blockIdx.x * chunk, end = begin + chunk < count ? begin + chunk : count;
  for (int c = threadIdx.x; c < n; c += blockDim.x) {
    Real sum = 0;
    for (int64_t r = begin; r < end; ++r) sum += rows[r * n + c];
    partials[blockIdx.x * static_cast<int64_t>(n) + c] += sum;
  }
}

// out[r*pitch + c] = sum of the splits' elements (r, c), split 0 first.
template <class Real>
__global__ void combine_kernel(const Real* partials, int64_t splits, int64_t rows, int columns, Real* out, int64_t pitch) {
  const int64_t elements = rows * columns;
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < elements;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    Real sum = 0;
    for (int64_t s = 0; s < splits; ++s) sum += partials[s * elements + e];
    out[e / columns * pitch + e % columns] = sum;
  }
}

// *total += sum of values. One block.
__global__ void __launch_bounds__(threads) add_total_kernel(const double* values, int count, double* total) {
  Shared shared;
  double* sums = shared.take<double>(threads);
  double sum = 0;
  for (int v = threadIdx.x; v < count; v += threads) sum += values[v];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = threads / 2; half; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) *total += sums[0];
}

// The first entry of a table of taps whose texel below is at least `texel` (they never descend).
template <class Real>
TCAM_DEVICE int64_t first_tap(const Tap<Real>* taps, int64_t count, int texel) {
  int64_t lo = 0, hi = count;
  while (lo < hi) {
    const int64_t middle = (lo + hi) / 2;
    if (taps[middle].lo < texel)
      lo = middle + 1;
    else
      hi = middle;
  }
  return lo;
}

// The adjoint of linear interpolation along one axis: out[r, y, :] = sum over x of w(x, r) in[x, y, :], x ascending: a gather,
// because the voxels that read a texel are neighbours. in is [x*x_step + y*y_step], out [r*r_step + y*y_out].
template <class Real>
__global__ void gather_axis_kernel(const Real* in, const Tap<Real>* taps, int64_t count, int n, int texels, int64_t ny,
                                   int64_t x_step, int64_t y_step, Real* out, int64_t r_step, int64_t y_out) {
  for (int64_t b = blockIdx.x; b < texels * ny; b += gridDim.x) {
    const int r = static_cast<int>(b / ny);
    const int64_t y = b % ny, begin = first_tap(taps, count, r - 1), end = first_tap(taps, count, r + 1);
    for (int c = threadIdx.x; c < n; c += blockDim.x) {
      Real sum = 0;
      for (int64_t x = begin; x < end; ++x) {
        const Tap<Real> t = taps[x];
        const Real w = (t.lo == r ? t.w_lo : Real(0)) + (t.hi == r ? t.w_hi : Real(0));
        sum += w * in[(x * x_step + y * y_step) * n + c];
      }
      out[(r * r_step + y * y_out) * n + c] = sum;
    }
  }
}

// ---- the call ----------------------------------------------------------------------------------

template <class Real>
class Run {
 public:
  Run(const tcam_decode_grid& problem, bool backward, void* workspace, cudaStream_t stream)
      : p(problem), stream_(stream), activation_(static_cast<Activation>(problem.activation)) {
    const int64_t h = p.planes[0], w = p.planes[1], d = p.planes[2];
    const int64_t rows[3] = {h, w, h}, columns[3] = {w, d, d};
    for (int q = 0; q < 3; ++q) n_[q] = p.hi[q] - p.lo[q], rows_[q] = rows[q], columns_[q] = columns[q];
    if (!backward && (p.compute == TCAM_BF16 || p.compute == TCAM_F16)) fused_width_ = choose_fused_width();
    choose_region(backward);
    carve(backward, workspace);
    if (fused_width_) carve_fused(workspace);
  }

  int64_t bytes() const { return bytes_; }

  cudaError_t forward(const void* const planes[3], const void* const* weights, const void* const* biases, void* volume,
                      const tcam_objective* objective, double* losses) {
    set(weights, biases);
    prepare();
    if constexpr (sizeof(Real) == sizeof(float))
      if (!objective && fused_width_) {
        const cudaError_t status = fused(planes, volume);
        if (status != cudaErrorInvalidConfiguration) return status;  // else: no shape of the kernel fits this device
        status_ = cudaSuccess;
      }
    if (objective) clear(losses, p.batch * sizeof(double));
    for (int64_t object = 0; object < p.batch && !status_; ++object) {
      project(planes, object);
      for_each_region([&](const Region& region) {
        const Real* z = hidden_layers(region);
        last_layer(z, region, object, volume, objective, losses, nullptr);
      });
    }
    return status_;
  }

  // `volume` is the gradient of the volume or, with an objective, its target.
  cudaError_t backward(const void* volume, const tcam_objective* objective, double* losses, const void* const planes[3],
                       const void* const* weights, const void* const* biases, void* const grad_planes[3],
                       void* const* grad_weights, void* const* grad_biases) {
    const bool per_object = objective && objective->per_object;
    set(weights, biases);
    prepare();
    if (objective) clear(losses, p.batch * sizeof(double));
    for (int64_t object = 0; object < p.batch && !status_; ++object) {
      if (object == 0 || per_object) clear_partials();
      project(planes, object);
      clear(da_, n_[0] * n_[1] * width(1) * sizeof(Real));
      clear(db_, n_[1] * n_[2] * width(1) * sizeof(Real));
      clear(dg_, n_[0] * n_[2] * width(1) * sizeof(Real));
      for_each_region([&](const Region& region) {
        const Real* z = hidden_layers(region);
        Real* delta = delta_[p.layers & 1];
        last_layer(z, region, object, const_cast<void*>(volume), objective, losses, delta);
        walk_back(region);
      });
      maps_to_planes(planes, grad_planes, object);
      if (p.grad_decoder && (per_object || object == p.batch - 1))
        write_decoder_gradients(grad_weights, grad_biases, per_object ? object : 0);
    }
    return status_;
  }

 private:
  const tcam_decode_grid& p;
  cudaStream_t stream_;
  Activation activation_;
  cudaError_t status_ = cudaSuccess;
  int64_t n_[3], rows_[3], columns_[3], region_size_[3], most_ = 0, bytes_ = 0;
  const Real *weights_[TCAM_MAX_LAYERS + 1] = {}, *biases_[TCAM_MAX_LAYERS + 1] = {};

  Tap<Real>* taps_[3];
  Real *projected_[3], *z_[TCAM_MAX_LAYERS + 1] = {}, *delta_[2] = {};
  double* losses_ = nullptr;
  Real *da_ = nullptr, *db_ = nullptr, *dg_ = nullptr, *between_ = nullptr, *grad_projected_[3] = {};
  Real *weight_partials_[TCAM_MAX_LAYERS + 1] = {}, *bias_partials_[TCAM_MAX_LAYERS + 1] = {}, *first_partials_[3] = {};
  char* cleared_ = nullptr;
  int64_t cleared_bytes_ = 0;

  int fused_width_ = 0;  // padded width of the hidden layers; 0: not for the fused kernel
  int64_t slab_ = 0;
  uint16_t *maps_[3] = {}, *fused_weights_ = nullptr;  // A and G of a slab of i, B of the volume
  float *fused_biases_ = nullptr, *fused_last_ = nullptr, *fused_last_bias_ = nullptr;

  int width(int layer) const { return static_cast<int>(p.width[layer]); }
  int64_t texels(int q) const { return rows_[q] * columns_[q]; }
  int64_t splits() const { return ceil_div(most_, voxel_chunk); }
  int64_t bias_splits() const { return ceil_div(most_, bias_chunk); }
  int64_t texel_chunk(int q) const { return ceil_div(texels(q), texel_splits); }
  int64_t row_chunk() const { return ceil_div(n_[0] * n_[1], row_splits); }

  void check(cudaError_t status) {
    if (status_ == cudaSuccess) status_ = status;
  }
  void clear(void* at, int64_t bytes) { check(cudaMemsetAsync(at, 0, static_cast<size_t>(bytes), stream_)); }
  static unsigned blocks(int64_t wanted) { return static_cast<unsigned>(wanted < 1 ? 1 : wanted < 65535 ? wanted : 65535); }
  static unsigned channel_threads(int n) { return n > 128 ? 256 : n > 64 ? 128 : n > 32 ? 64 : 32; }

  // As many whole rows and slices as the voxels allowed, from the problem alone.
  void choose_region(bool backward) {
    int64_t each = sizeof(double), widest = 1;  // bytes a voxel
    for (int l = 1; l <= p.layers; ++l) {
      widest = width(l) > widest ? width(l) : widest;
      if (backward) each += width(l) * sizeof(Real);
    }
    each += 2 * widest * sizeof(Real);
    int64_t left = p.tile > 0 ? p.tile : region_voxels;
    if (left > region_bytes / each) left = region_bytes / each;
    for (int a = 2; a >= 0; --a) {
      region_size_[a] = n_[a] < left ? n_[a] : left;
      left = left / region_size_[a] > 1 ? left / region_size_[a] : 1;
    }
    most_ = region_size_[0] * region_size_[1] * region_size_[2];
  }

  void carve(bool backward, void* workspace) {
    Carver ws(workspace);
    auto reals = [&](int64_t count) { return reinterpret_cast<Real*>(ws.take(count * static_cast<int64_t>(sizeof(Real)))); };
    const int L = p.layers;
    const int n1 = width(1);
    for (int a = 0; a < 3; ++a)
      taps_[a] = reinterpret_cast<Tap<Real>*>(ws.take(n_[a] * static_cast<int64_t>(sizeof(Tap<Real>))));
    for (int q = 0; q < 3; ++q) projected_[q] = reals(texels(q) * n1);
    losses_ = reinterpret_cast<double*>(ws.take(most_ * static_cast<int64_t>(sizeof(double))));
    int widest = 1;
    for (int l = 1; l <= L; ++l) widest = width(l) > widest ? width(l) : widest;
    if (!backward) {
      Real* two[2] = {reals(most_ * widest), reals(L > 2 ? most_ * widest : 0)};
      for (int l = 1; l <= L; ++l) z_[l] = two[l & 1 ? 0 : 1];
    } else {
      for (int l = 1; l < L || l == 1; ++l) z_[l] = reals(most_ * width(l));
      delta_[0] = reals(most_ * widest);
      delta_[1] = reals(most_ * widest);
      da_ = reals(n_[0] * n_[1] * n1);
      db_ = reals(n_[1] * n_[2] * n1);
      dg_ = reals(n_[0] * n_[2] * n1);
      int64_t most_between = 0;
      for (int64_t size : {rows_[0] * n_[1], rows_[1] * n_[2], rows_[2] * n_[2]})
        most_between = size > most_between ? size : most_between;
      between_ = reals(most_between * n1);
      for (int q = 0; q < 3; ++q) grad_projected_[q] = reals(texels(q) * n1);
      if (p.grad_decoder) {
        const int64_t begin = ws.used();
        for (int q = 0; q < 3; ++q) first_partials_[q] = reals(texel_splits * n1 * p.channels);
        bias_partials_[1] = reals(row_splits * n1);
        for (int l = 2; l <= L; ++l) {
          weight_partials_[l] = reals(splits() * width(l) * width(l - 1));
          bias_partials_[l] = reals(bias_splits() * width(l));
        }
        cleared_ = static_cast<char*>(workspace) + begin;
        cleared_bytes_ = ws.used() - begin;
      }
    }
    bytes_ = ws.used();
  }

  int choose_fused_width() const {
    const int L = p.layers;
    if (activation_ != Activation::relu || L < 3 || L - 2 > fused_most_products || p.width[L] > fused_most_out) return 0;
    int64_t widest = 0;
    for (int l = 1; l < L; ++l) widest = p.width[l] > widest ? p.width[l] : widest;
    if (n_[0] > INT32_MAX / n_[1] || n_[0] * n_[1] > INT32_MAX / ceil_div(n_[2], 32)) return 0;  // it counts its tiles in int
    return widest <= 64 ? 64 : widest <= 128 ? 128 : 0;
  }

  void carve_fused(void* workspace) {  // over the same memory as the regions, which it replaces
    Carver ws(workspace);
    const int64_t N = fused_width_, products = p.layers - 2;
    for (int a = 0; a < 3; ++a) ws.take(n_[a] * static_cast<int64_t>(sizeof(Tap<Real>)));            // taps_
    for (int q = 0; q < 3; ++q) ws.take(texels(q) * width(1) * static_cast<int64_t>(sizeof(Real)));  // projected_
    const int64_t each = (n_[1] + n_[2]) * N * 2;
    slab_ = n_[0] < slab_bytes / each ? n_[0] : slab_bytes / each > 1 ? slab_bytes / each : 1;
    maps_[0] = reinterpret_cast<uint16_t*>(ws.take(slab_ * n_[1] * N * 2));
    maps_[1] = reinterpret_cast<uint16_t*>(ws.take(n_[1] * n_[2] * N * 2));
    maps_[2] = reinterpret_cast<uint16_t*>(ws.take(slab_ * n_[2] * N * 2));
    fused_weights_ = reinterpret_cast<uint16_t*>(ws.take(products * N * N * 2));
    fused_biases_ = reinterpret_cast<float*>(ws.take(products * N * 4));
    fused_last_ = reinterpret_cast<float*>(ws.take(fused_most_out * N * 4));
    fused_last_bias_ = reinterpret_cast<float*>(ws.take(fused_most_out * 4));
    bytes_ = ws.used() > bytes_ ? ws.used() : bytes_;
  }

  cudaError_t fused(const void* const planes[3], void* volume) {
    return p.compute == TCAM_BF16 ? fused_in<ptx::BFloat16>(planes, volume) : fused_in<ptx::Float16>(planes, volume);
  }

  template <class T>
  cudaError_t fused_in(const void* const planes[3], void* volume) {
    const int L = p.layers, N = fused_width_, products = L - 2;
    Device device;
    int id = 0;
    check(cudaGetDevice(&id));
    check(cudaDeviceGetAttribute(&device.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, id));
    check(cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, id));
    for (int l = 2; l < L; ++l)
      check(launch(pad_hidden_kernel<T>, blocks(ceil_div(N * N, threads)), threads, 0, stream_, weights_[l], biases_[l],
                   width(l), width(l - 1), N, fused_weights_ + static_cast<int64_t>(l - 2) * N * N,
                   fused_biases_ + (l - 2) * N));
    check(launch(pad_last_kernel, 1, threads, 0, stream_, weights_[L], biases_[L], width(L), width(L - 1), N, fused_last_,
                 fused_last_bias_));
    const int64_t voxels = n_[0] * n_[1] * n_[2];
    for (int64_t object = 0; object < p.batch && !status_; ++object) {
      project(planes, object);
      map<T>(1, taps_[1], n_[1], nullptr);
      for (int64_t i0 = 0; i0 < n_[0] && !status_; i0 += slab_) {
        const int64_t ni = n_[0] - i0 < slab_ ? n_[0] - i0 : slab_;
        map<T>(0, taps_[0] + i0, ni, biases_[1]);
        map<T>(2, taps_[0] + i0, ni, nullptr);
        const FusedForward call = {
            maps_[0],
            maps_[1],
            maps_[2],
            fused_weights_,
            fused_biases_,
            fused_last_,
            fused_last_bias_,
            width(L),
            static_cast<OutputActivation>(p.output_activation),
            static_cast<char*>(volume) + (object * width(L) * voxels + i0 * n_[1] * n_[2]) * dtype_bytes(p.out_dtype),
            p.out_dtype,
            voxels,
            static_cast<int>(ni),
            static_cast<int>(n_[1]),
            static_cast<int>(n_[2])};
        check(T::dtype == TCAM_BF16 ? fused_forward_bfloat16(call, N, products, device, stream_)
                                    : fused_forward_float16(call, N, products, device, stream_));
      }
    }
    return status_;
  }

  // Map q (0: A, 1: B, 2: G) at `nx` rows.
  template <class T>
  void map(int q, const Tap<Real>* rows, int64_t nx, const Real* bias) {
    const int columns_axis = q == 0 ? 1 : 2;
    check(launch(map_kernel<T>, blocks(ceil_div(nx * n_[columns_axis], warps)), threads, 0, stream_, projected_[q],
                 static_cast<int>(columns_[q]), width(1), fused_width_, rows, taps_[columns_axis], nx, n_[columns_axis], bias,
                 maps_[q]));
  }

  void set(const void* const* weights, const void* const* biases) {
    for (int l = 1; l <= p.layers; ++l) {
      weights_[l] = static_cast<const Real*>(weights[l - 1]);
      biases_[l] = static_cast<const Real*>(biases[l - 1]);
    }
  }

  void clear_partials() {
    if (p.grad_decoder) clear(cleared_, cleared_bytes_);
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

  void prepare() {
    for (int a = 0; a < 3; ++a)
      check(launch(taps_kernel<Real>, blocks(ceil_div(n_[a], threads)), threads, 0, stream_, p.lo[a], n_[a], p.size[a],
                   static_cast<int>(p.planes[a]), p.align_corners != 0, p.padding == TCAM_PAD_ZEROS, taps_[a]));
  }

  const Real* plane(const void* const planes[3], int q, int64_t object) const {
    return static_cast<const Real*>(planes[q]) + object * p.channels * texels(q);
  }
  const Real* first_weight(int q) const { return weights_[1] + q * p.channels; }  // of W_1 = [W_xy | W_yz | W_xz]

  void project(const void* const planes[3], int64_t object) {
    for (int q = 0; q < 3; ++q)
      check(gemm<Real, 64>(texels(q), width(1), p.channels, 0, Transposed<Real>{plane(planes, q, object), texels(q)},
                           Transposed<Real>{first_weight(q), 3 * p.channels}, WriteRows<Real>{projected_[q], width(1), nullptr},
                           stream_));
  }

  // z of layers 1 to L-1; the pointer is to the last of them (to z_1 with one layer).
  const Real* hidden_layers(const Region& region) {
    const int64_t voxels = region.voxels();
    const Sampled<Real> sampled = {
        {projected_[0], projected_[1], projected_[2]},
        {static_cast<int>(columns_[0]), static_cast<int>(columns_[1]), static_cast<int>(columns_[2])},
        {taps_[0], taps_[1], taps_[2]},
        biases_[1],
        width(1)};
    check(launch(first_layer_kernel<Real>, blocks(ceil_div(voxels, warps)), threads, 0, stream_, sampled, region, z_[1]));
    for (int l = 2; l < p.layers; ++l)
      check(gemm<Real, 64>(voxels, width(l), width(l - 1), 0, Activated<Real>{z_[l - 1], width(l - 1), activation_},
                           Transposed<Real>{weights_[l], width(l - 1)}, WriteRows<Real>{z_[l], width(l), biases_[l]}, stream_));
    return z_[p.layers > 1 ? p.layers - 1 : 1];
  }

  void last_layer(const Real* z, const Region& region, int64_t object, void* volume, const tcam_objective* objective,
                  double* losses, Real* delta) {
    const int L = p.layers, dtype = objective ? objective->target_dtype : p.out_dtype;
    const int64_t stride = n_[0] * n_[1] * n_[2];
    const LastLayer<Real> last = {z,
                                  L > 1 ? weights_[L] : nullptr,
                                  biases_[L],
                                  L > 1 ? width(L - 1) : width(1),
                                  width(L),
                                  activation_,
                                  static_cast<OutputActivation>(p.output_activation),
                                  static_cast<char*>(volume) + object * width(L) * stride * dtype_bytes(dtype),
                                  dtype,
                                  stride,
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
        check(
            launch(add_total_kernel, 1, threads, threads * sizeof(double), stream_, losses_, region.voxels(), losses + object));
    }
  }

  // From delta_L in delta_[L & 1] to the maps dA, dB, dG, and to the partial sums of the decoder's gradients.
  void walk_back(const Region& region) {
    const int64_t voxels = region.voxels();
    for (int l = p.layers; l >= 2; --l) {
      const Real* delta = delta_[l & 1];
      const int n = width(l), m = width(l - 1);
      if (p.grad_decoder) {
        const Transposed<Real> a = {delta, n};
        const Activated<Real> b = {z_[l - 1], m, activation_};
        const AddPartial<Real> add = {weight_partials_[l], n, m};
        check(n <= 16 ? gemm<Real, 16>(n, m, voxels, voxel_chunk, a, b, add, stream_)
                      : gemm<Real, 64>(n, m, voxels, voxel_chunk, a, b, add, stream_));
        check(launch(add_column_sums_kernel<Real>, static_cast<unsigned>(ceil_div(voxels, bias_chunk)), channel_threads(n), 0,
                     stream_, delta, voxels, n, bias_chunk, bias_partials_[l]));
      }
      Real* next = delta_[(l - 1) & 1];
      if (l == p.layers)
        check(launch(last_delta_kernel<Real>, blocks(ceil_div(voxels * m, threads)), threads, 0, stream_, delta, n, weights_[l],
                     z_[l - 1], m, activation_, voxels * m, next));
      else
        check(gemm<Real, 64>(voxels, m, n, 0, Rows<Real>{delta, n}, Rows<Real>{weights_[l], m},
                             WriteDelta<Real>{next, z_[l - 1], m, activation_}, stream_));
    }
    const int64_t slice = static_cast<int64_t>(region.nj) * region.nk, row = region.nk;
    const int n1 = width(1);
    add_axis_sum(da_ + (region.i0 * n_[1] + region.j0) * n1, n_[1], region.ni, region.nj, region.nk, slice, row, 1);
    add_axis_sum(db_ + (region.j0 * n_[2] + region.k0) * n1, n_[2], region.nj, region.nk, region.ni, row, 1, slice);
    add_axis_sum(dg_ + (region.i0 * n_[2] + region.k0) * n1, n_[2], region.ni, region.nk, region.nj, slice, 1, row);
  }

  void add_axis_sum(Real* map, int64_t pitch, int nx, int ny, int ns, int64_t x_step, int64_t y_step, int64_t s_step) {
    check(launch(add_axis_sum_kernel<Real>, blocks(static_cast<int64_t>(nx) * ny), channel_threads(width(1)), 0, stream_,
                 delta_[1], width(1), nx, ny, ns, x_step, y_step, s_step, map, pitch));
  }

  void gather(const Real* in, int axis, int64_t ny, int64_t x_step, int64_t y_step, Real* out, int64_t r_step, int64_t y_out) {
    check(launch(gather_axis_kernel<Real>, blocks(p.planes[axis] * ny), channel_threads(width(1)), 0, stream_, in, taps_[axis],
                 n_[axis], width(1), static_cast<int>(p.planes[axis]), ny, x_step, y_step, out, r_step, y_out));
  }

  void maps_to_planes(const void* const planes[3], void* const grad_planes[3], int64_t object) {
    const Real* maps[3] = {da_, db_, dg_};
    const int axes[3][2] = {{0, 1}, {1, 2}, {0, 2}};
    for (int q = 0; q < 3; ++q) {
      const int u = axes[q][0], v = axes[q][1];
      gather(maps[q], u, n_[v], n_[v], 1, between_, n_[v], 1);                      // voxels to texels along rows,
      gather(between_, v, rows_[q], 1, n_[v], grad_projected_[q], 1, columns_[q]);  // then along columns
      if (p.grad_decoder)
        check(gemm<Real, 64>(width(1), static_cast<int>(p.channels), texels(q), texel_chunk(q),
                             Transposed<Real>{grad_projected_[q], width(1)},
                             Transposed<Real>{plane(planes, q, object), texels(q)},
                             AddPartial<Real>{first_partials_[q], width(1), p.channels}, stream_));
      if (p.grad_planes)
        check(gemm<Real, 64>(
            texels(q), static_cast<int>(p.channels), width(1), 0, Rows<Real>{grad_projected_[q], width(1)},
            Rows<Real>{first_weight(q), 3 * p.channels},
            WriteTransposed<Real>{static_cast<Real*>(grad_planes[q]) + object * p.channels * texels(q), texels(q)}, stream_));
    }
    if (p.grad_decoder)
      check(launch(add_column_sums_kernel<Real>, static_cast<unsigned>(ceil_div(n_[0] * n_[1], row_chunk())),
                   channel_threads(width(1)), 0, stream_, da_, n_[0] * n_[1], width(1), row_chunk(), bias_partials_[1]));
  }

  void combine(const Real* partials, int64_t splits, int64_t rows, int64_t columns, Real* out, int64_t pitch) {
    check(launch(combine_kernel<Real>, blocks(ceil_div(rows * columns, threads)), threads, 0, stream_, partials, splits, rows,
                 static_cast<int>(columns), out, pitch));
  }

  void write_decoder_gradients(void* const* grad_weights, void* const* grad_biases, int64_t object) {
    auto weight = [&](int l) { return static_cast<Real*>(grad_weights[l - 1]) + object * p.width[l] * p.width[l - 1]; };
    auto bias = [&](int l) { return static_cast<Real*>(grad_biases[l - 1]) + object * p.width[l]; };
    for (int q = 0; q < 3; ++q)
      combine(first_partials_[q], texel_splits, width(1), p.channels, weight(1) + q * p.channels, 3 * p.channels);
    if (grad_biases[0]) combine(bias_partials_[1], row_splits, 1, width(1), bias(1), width(1));
    for (int l = 2; l <= p.layers; ++l) {
      combine(weight_partials_[l], splits(), width(l), width(l - 1), weight(l), width(l - 1));
      if (grad_biases[l - 1]) combine(bias_partials_[l], bias_splits(), 1, width(l), bias(l), width(l));
    }
  }
};

template <class F>
int with_run(const tcam_decode_grid& problem, bool backward, void* workspace, int device, void* stream, F f) {
  DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (problem.dtype == TCAM_F64) {
    Run<double> run(problem, backward, workspace, s);
    return f(run);
  }
  Run<float> run(problem, backward, workspace, s);
  return f(run);
}

}  // namespace
}  // namespace tcam

extern "C" int64_t tcam_decode_grid_cuda_workspace(const tcam_decode_grid* problem, int backward) {
  if (problem->dtype == TCAM_F64) return tcam::Run<double>(*problem, backward != 0, nullptr, nullptr).bytes();
  return tcam::Run<float>(*problem, backward != 0, nullptr, nullptr).bytes();
}

extern "C" int tcam_decode_grid_cuda(const tcam_decode_grid* problem, const void* const planes[3], const void* const* weights,
                                     const void* const* biases, void* volume, void* workspace, int device, void* stream) {
  return tcam::with_run(*problem, false, workspace, device, stream,
                        [&](auto& run) { return run.forward(planes, weights, biases, volume, nullptr, nullptr); });
}

extern "C" int tcam_decode_grid_backward_cuda(const tcam_decode_grid* problem, const void* grad_volume,
                                              const void* const planes[3], const void* const* weights,
                                              const void* const* biases, void* const grad_planes[3], void* const* grad_weights,
                                              void* const* grad_biases, void* workspace, int device, void* stream) {
  return tcam::with_run(*problem, true, workspace, device, stream, [&](auto& run) {
    return run.backward(grad_volume, nullptr, nullptr, planes, weights, biases, grad_planes, grad_weights, grad_biases);
  });
}

extern "C" int tcam_decode_grid_loss_cuda(const tcam_decode_grid* problem, const tcam_objective* objective,
                                          const void* const planes[3], const void* const* weights, const void* const* biases,
                                          double* losses, void* const grad_planes[3], void* const* grad_weights,
                                          void* const* grad_biases, void* workspace, int device, void* stream) {
  const bool gradients = problem->grad_planes || problem->grad_decoder;
  return tcam::with_run(*problem, gradients, workspace, device, stream, [&](auto& run) {
    if (!gradients) return run.forward(planes, weights, biases, const_cast<void*>(objective->target), objective, losses);
    return run.backward(objective->target, objective, losses, planes, weights, biases, grad_planes, grad_weights, grad_biases);
  });
}
