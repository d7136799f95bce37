// What both roads of decode_grid share on CUDA: from the planes to their projections (kernels.md, fact 1), and from the
// gradients of the first layer's maps dA, dB, dG back to the planes and to the first layer. The maps go to texels by a gather,
// so no sum needs atomics and each has one order.
#pragma once
#include "../carver.h"
#include "../maths/loss.h"
#include "gemm.h"

namespace tcam {

constexpr int64_t texel_splits = 32, row_splits = 64;  // partial sums over texels, and over rows of dA
constexpr int threads = 256, warps = threads / 32;

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

template <class Real>
TCAM_DEVICE Real bilinear(const Real* plane, int columns, int n, int c, const Tap<Real>& t, const Tap<Real>& u) {
  const Real* lo = plane + static_cast<int64_t>(t.lo) * columns * n + c;
  const Real* hi = plane + static_cast<int64_t>(t.hi) * columns * n + c;
  const int64_t a = static_cast<int64_t>(u.lo) * n, b = static_cast<int64_t>(u.hi) * n;
  return t.w_lo * (u.w_lo * lo[a] + u.w_hi * lo[b]) + t.w_hi * (u.w_lo * hi[a] + u.w_hi * hi[b]);
}

// ---- operands of the products ----------------------------------------------------------------

// Element (row, column) of a row-major matrix, or of its transpose.
template <class Real>
struct Rows {
  static constexpr bool columns_adjacent = true;
  const Real* data;
  int64_t pitch;
  TCAM_DEVICE Real load(int64_t r, int64_t c) const { return data[r * pitch + c]; }
  TCAM_DEVICE Real value(Real x) const { return x; }
};
template <class Real>
struct Transposed {
  static constexpr bool columns_adjacent = false;
  const Real* data;
  int64_t pitch;
  TCAM_DEVICE Real load(int64_t r, int64_t c) const { return data[c * pitch + r]; }
  TCAM_DEVICE Real value(Real x) const { return x; }
};
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
struct AddPartial {
  Real* partials;  // (splits, rows, columns)
  int64_t rows, columns;
  TCAM_DEVICE void operator()(int split, int64_t r, int c, Real sum) const {
    partials[(split * rows + r) * columns + c] += sum;
  }
};

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

// Partial sums of a matrix: split s at data + s * split_pitch, rows `row_pitch` apart.
template <class Real>
struct Partials {
  const Real* data;
  int64_t splits, split_pitch, row_pitch;
};

// out[r*pitch + c] = factor (null: 1) times the sum of the splits' elements (r, c), split 0 first.
template <class Real>
__global__ void combine_kernel(Partials<Real> in, int64_t rows, int columns, const Real* factor, Real* out, int64_t pitch) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < rows * columns;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t r = e / columns, c = e % columns;
    Real sum = 0;
    for (int64_t s = 0; s < in.splits; ++s) sum += in.data[s * in.split_pitch + r * in.row_pitch + c];
    out[r * pitch + c] = factor ? sum * *factor : sum;
  }
}

// join(join(x_0, x_1), ...) of what a block's `threads` threads bring, in one order, for thread 0. `all`: `threads` numbers.
template <class Number, class Join>
TCAM_DEVICE Number reduce_block(Number own, Number* all, Join join) {
  all[threadIdx.x] = own;
  __syncthreads();
  for (int half = threads / 2; half; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) all[threadIdx.x] = join(all[threadIdx.x], all[threadIdx.x + half]);
    __syncthreads();
  }
  return all[0];
}
constexpr size_t reduce_bytes = threads * sizeof(double);

// *total += sum of values. One block.
static __global__ void __launch_bounds__(threads) add_total_kernel(const double* values, int count, double* total) {
  Shared shared;
  double* all = shared.take<double>(threads);
  double sum = 0;
  for (int v = threadIdx.x; v < count; v += threads) sum += values[v];
  sum = reduce_block(sum, all, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0) *total += sum;
}

// ---- back to texels ---------------------------------------------------------------------------

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

// A call of decode_grid. Walk: what lies between projections and maps, and is the road's own.
template <class Real>
class Planes {
 public:
  virtual ~Planes() = default;
  int64_t bytes() const { return bytes_; }  // of the workspace

  // With an objective: the losses, `volume` being the target.
  cudaError_t forward(const void* const planes[3], const void* const* weights, const void* const* biases, void* volume,
                      const tcam_objective* objective, double* losses) {
    set(weights, biases);
    prepare();
    if (objective) clear(losses, p.batch * sizeof(double));
    for (int64_t object = 0; object < p.batch && !status_; ++object) {
      project(planes, object);
      walk(object, volume, objective, losses, false);
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
    look_at(volume, objective);
    for (int64_t object = 0; object < p.batch && !status_; ++object) {
      if (object == 0 || per_object) clear(cleared_, cleared_bytes_);
      project(planes, object);
      clear(da_, n_[0] * n_[1] * width(1) * sizeof(Real));
      clear(db_, n_[1] * n_[2] * width(1) * sizeof(Real));
      clear(dg_, n_[0] * n_[2] * width(1) * sizeof(Real));
      walk(object, const_cast<void*>(volume), objective, losses, true);
      maps_to_planes(planes, grad_planes, object);
      if (p.grad_decoder && (per_object || object == p.batch - 1)) {
        for (int l = 1; l <= p.layers; ++l) {
          const int64_t row = per_object ? object : 0;
          Real* bias = static_cast<Real*>(grad_biases[l - 1]);
          grad_weight_[l] = static_cast<Real*>(grad_weights[l - 1]) + row * p.width[l] * p.width[l - 1];
          grad_bias_[l] = bias ? bias + row * p.width[l] : nullptr;
        }
        write_first_gradients();
        write_gradients();
      }
    }
    return status_;
  }

 protected:
  const tcam_decode_grid& p;
  cudaStream_t stream_;
  cudaError_t status_ = cudaSuccess;
  int64_t n_[3], rows_[3], columns_[3], bytes_ = 0;
  const Real *weights_[TCAM_MAX_LAYERS + 1] = {}, *biases_[TCAM_MAX_LAYERS + 1] = {};
  Tap<Real>* taps_[3];
  Real *projected_[3], *da_ = nullptr, *db_ = nullptr, *dg_ = nullptr;
  Real *grad_weight_[TCAM_MAX_LAYERS + 1] = {}, *grad_bias_[TCAM_MAX_LAYERS + 1] = {};  // of the object; null: not there
  char* cleared_ = nullptr;  // the partial sums of the decoder's gradients
  int64_t cleared_bytes_ = 0;

  Planes(const tcam_decode_grid& problem, cudaStream_t stream) : p(problem), stream_(stream) {
    const int64_t h = p.planes[0], w = p.planes[1], d = p.planes[2];
    const int64_t rows[3] = {h, w, h}, columns[3] = {w, d, d};
    for (int q = 0; q < 3; ++q) n_[q] = p.hi[q] - p.lo[q], rows_[q] = rows[q], columns_[q] = columns[q];
  }

  // The road's own part: from the projections of an object to its volume or losses; backward also adds to dA, dB, dG and to the
  // partial sums of layers 2 and up, which write_gradients makes gradients of.
  virtual void walk(int64_t object, void* volume, const tcam_objective* objective, double* losses, bool backward) = 0;
  virtual void write_gradients() = 0;
  virtual void look_at(const void*, const tcam_objective*) {}  // at the gradient or the target, before backward

  int width(int layer) const { return static_cast<int>(p.width[layer]); }
  int64_t texels(int q) const { return rows_[q] * columns_[q]; }
  int64_t texel_chunk(int q) const { return ceil_div(texels(q), texel_splits); }
  int64_t row_chunk() const { return ceil_div(n_[0] * n_[1], row_splits); }
  Real* reals(Carver& ws, int64_t count) {
    return reinterpret_cast<Real*>(ws.take(count * static_cast<int64_t>(sizeof(Real))));
  }

  void check(cudaError_t status) {
    if (status_ == cudaSuccess) status_ = status;
  }
  void clear(void* at, int64_t bytes) {
    if (bytes) check(cudaMemsetAsync(at, 0, static_cast<size_t>(bytes), stream_));
  }
  static unsigned blocks(int64_t wanted) { return static_cast<unsigned>(wanted < 1 ? 1 : wanted < 65535 ? wanted : 65535); }
  static unsigned channel_threads(int n) { return n > 128 ? 256 : n > 64 ? 128 : n > 32 ? 64 : 32; }

  void carve_planes(Carver& ws, bool backward) {
    const int n1 = width(1);
    for (int a = 0; a < 3; ++a)
      taps_[a] = reinterpret_cast<Tap<Real>*>(ws.take(n_[a] * static_cast<int64_t>(sizeof(Tap<Real>))));
    for (int q = 0; q < 3; ++q) projected_[q] = reals(ws, texels(q) * n1);
    if (!backward) return;
    da_ = reals(ws, n_[0] * n_[1] * n1);
    db_ = reals(ws, n_[1] * n_[2] * n1);
    dg_ = reals(ws, n_[0] * n_[2] * n1);
    int64_t most_between = 0;
    for (int64_t size : {rows_[0] * n_[1], rows_[1] * n_[2], rows_[2] * n_[2]})
      most_between = size > most_between ? size : most_between;
    between_ = reals(ws, most_between * n1);
    for (int q = 0; q < 3; ++q) grad_projected_[q] = reals(ws, texels(q) * n1);
  }
  // After it the road takes its own partial sums, and calls end_partials.
  int64_t begin_partials(Carver& ws) {
    const int64_t begin = ws.used();
    for (int q = 0; q < 3; ++q) first_partials_[q] = reals(ws, texel_splits * width(1) * p.channels);
    first_bias_partials_ = reals(ws, row_splits * width(1));
    return begin;
  }
  void end_partials(Carver& ws, void* workspace, int64_t begin) {
    cleared_ = static_cast<char*>(workspace) + begin;
    cleared_bytes_ = ws.used() - begin;
  }

  void combine(const Partials<Real>& partials, int64_t rows, int64_t columns, const Real* factor, Real* out, int64_t pitch) {
    check(launch(combine_kernel<Real>, blocks(ceil_div(rows * columns, threads)), threads, 0, stream_, partials, rows,
                 static_cast<int>(columns), factor, out, pitch));
  }
  void add_axis_sum(const Real* in, Real* map, int64_t pitch, int64_t nx, int64_t ny, int64_t ns, int64_t x_step,
                    int64_t y_step, int64_t s_step) {
    check(launch(add_axis_sum_kernel<Real>, blocks(nx * ny), channel_threads(width(1)), 0, stream_, in, width(1),
                 static_cast<int>(nx), static_cast<int>(ny), static_cast<int>(ns), x_step, y_step, s_step, map, pitch));
  }

 private:
  Real *between_ = nullptr, *grad_projected_[3] = {}, *first_partials_[3] = {}, *first_bias_partials_ = nullptr;

  void set(const void* const* weights, const void* const* biases) {
    for (int l = 1; l <= p.layers; ++l) {
      weights_[l] = static_cast<const Real*>(weights[l - 1]);
      biases_[l] = static_cast<const Real*>(biases[l - 1]);
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
      check(gemm<Scalars<Real, 64>>(texels(q), width(1), p.channels, 0, Transposed<Real>{plane(planes, q, object), texels(q)},
                                    Transposed<Real>{first_weight(q), 3 * p.channels},
                                    WriteRows<Real>{projected_[q], width(1), nullptr}, stream_));
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
        check(gemm<Scalars<Real, 64>>(width(1), static_cast<int>(p.channels), texels(q), texel_chunk(q),
                                      Transposed<Real>{grad_projected_[q], width(1)},
                                      Transposed<Real>{plane(planes, q, object), texels(q)},
                                      AddPartial<Real>{first_partials_[q], width(1), p.channels}, stream_));
      if (p.grad_planes)
        check(gemm<Scalars<Real, 64>>(
            texels(q), static_cast<int>(p.channels), width(1), 0, Rows<Real>{grad_projected_[q], width(1)},
            Rows<Real>{first_weight(q), 3 * p.channels},
            WriteTransposed<Real>{static_cast<Real*>(grad_planes[q]) + object * p.channels * texels(q), texels(q)}, stream_));
    }
    if (p.grad_decoder)
      check(launch(add_column_sums_kernel<Real>, static_cast<unsigned>(ceil_div(n_[0] * n_[1], row_chunk())),
                   channel_threads(width(1)), 0, stream_, da_, n_[0] * n_[1], width(1), row_chunk(), first_bias_partials_));
  }

  void write_first_gradients() {
    const int64_t n1 = width(1);
    for (int q = 0; q < 3; ++q)
      combine({first_partials_[q], texel_splits, n1 * p.channels, p.channels}, n1, p.channels, nullptr,
              grad_weight_[1] + q * p.channels, 3 * p.channels);
    if (grad_bias_[1]) combine({first_bias_partials_, row_splits, n1, n1}, 1, n1, nullptr, grad_bias_[1], n1);
  }
};

}  // namespace tcam
