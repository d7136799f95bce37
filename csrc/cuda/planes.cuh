// What the fused and the general kernels of decode_grid share on CUDA: from the planes to their projections (sampling and the
// first layer commute), and from the gradients of the first layer's maps dA, dB, dG back to the planes and to the first layer.
// The maps go to texels by a gather, so no sum needs atomics and each has one order.
#pragma once
#include <stdio.h>

#include "../carver.h"
#include "../maths/loss.h"
#include "gemm.cuh"

namespace tcam {

constexpr int64_t texel_splits = 32, row_splits = 64;  // partial sums over texels, and over rows of dA
constexpr int threads = 256, warps = threads / 32;

// What a call is for.
enum class Output { volume, losses, gradients };

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- the axes ----------------------------------------------------------------------------

template <class Real>
struct VoxelTap {
  int lo, hi;
  Real w_lo, w_hi;
};

// Of voxels first, first + 1, ... of `size`, weights times `scale`; see voxel_tap.
template <class Real>
__global__ void taps_kernel(int64_t first, int64_t count, int64_t size, Axis axis, bool corners, const double* bounds,
                            double scale, VoxelTap<Real>* out) {
  for (int64_t x = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; x < count;
       x += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const Tap<double> t = voxel_tap(axis, first + x, size, corners, bounds);
    out[x] = {t.lo, t.hi, static_cast<Real>(t.w_lo * scale), static_cast<Real>(t.w_hi * scale)};
  }
}

// Planes that a map or a voxel sums: (rows, columns, n) each, with the taps of its rows and columns.
template <class Real>
struct PlaneList {
  int count;
  const Real* plane[TCAM_MAX_PLANES];
  int columns[TCAM_MAX_PLANES];
  int row_axis[TCAM_MAX_PLANES], column_axis[TCAM_MAX_PLANES];
  const VoxelTap<Real>*rows_at[TCAM_MAX_PLANES], *columns_at[TCAM_MAX_PLANES];
};

template <class Real>
TCAM_DEVICE Real bilinear(const Real* plane, int columns, int n, int c, const VoxelTap<Real>& t, const VoxelTap<Real>& u) {
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

// The first entry of an ascending table of taps whose texel below is at least `texel`.
template <class Real>
TCAM_DEVICE int64_t first_tap(const VoxelTap<Real>* taps, int64_t count, int texel) {
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
// because the voxels that read a texel are neighbours where the taps ascend; where they do not, all are looked at.
// in is [x*x_step + y*y_step], out [r*r_step + y*y_out].
template <class Real>
__global__ void gather_axis_kernel(const Real* in, const VoxelTap<Real>* taps, bool ascending, int64_t count, int n, int texels,
                                   int64_t ny, int64_t x_step, int64_t y_step, Real* out, int64_t r_step, int64_t y_out) {
  for (int64_t b = blockIdx.x; b < texels * ny; b += gridDim.x) {
    const int r = static_cast<int>(b / ny);
    const int64_t y = b % ny, begin = ascending ? first_tap(taps, count, r - 1) : 0,
                  end = ascending ? first_tap(taps, count, r + 1) : count;
    for (int c = threadIdx.x; c < n; c += blockDim.x) {
      Real sum = 0;
      for (int64_t x = begin; x < end; ++x) {
        const VoxelTap<Real> t = taps[x];
        if (t.lo != r && t.hi != r) continue;
        const Real w = (t.lo == r ? t.w_lo : Real(0)) + (t.hi == r ? t.w_hi : Real(0));
        sum += w * in[(x * x_step + y * y_step) * n + c];
      }
      out[(r * r_step + y * y_out) * n + c] = sum;
    }
  }
}

// ---- the call ----------------------------------------------------------------------------------

// A call of decode_grid. Walk: what lies between projections and maps, and is a subclass's own.
template <class Real>
class Planes {
 public:
  virtual ~Planes() = default;
  int64_t bytes() const { return bytes_; }  // of the workspace

  // With an objective: the losses, `volume` being the target.
  cudaError_t forward(const tcam_inputs& in, void* volume, const tcam_objective* objective, double* losses) {
    set(in);
    if (objective) clear(losses, p.batch * sizeof(double));
    for (int64_t object = 0; object < p.batch && !status_; ++object) {
      project(in, object);
      walk(object, volume, objective, losses, false);
    }
    return status_;
  }

  // `volume` is the gradient of the volume or, with an objective, its target.
  cudaError_t backward(const tcam_inputs& in, const void* volume, const tcam_objective* objective, double* losses,
                       const tcam_gradients& to) {
    const bool per_object = objective && objective->per_object;
    set(in);
    if (objective) clear(losses, p.batch * sizeof(double));
    look_at(volume, objective);
    for (int64_t object = 0; object < p.batch && !status_; ++object) {
      if (object == 0 || per_object) clear(cleared_, cleared_bytes_);
      project(in, object);
      clear(da_, n_[0] * n_[1] * width(1) * sizeof(Real));
      clear(db_, n_[1] * n_[2] * width(1) * sizeof(Real));
      clear(dg_, n_[0] * n_[2] * width(1) * sizeof(Real));
      walk(object, const_cast<void*>(volume), objective, losses, true);
      maps_to_planes(in, to, object);
      if (p.grad_decoder && (per_object || object == p.batch - 1)) {
        place_gradients(to, per_object ? object : 0);
        write_first_gradients();
        write_gradients();
      }
    }
    return status_;
  }

 protected:
  const tcam_problem& p;
  cudaStream_t stream_;
  cudaError_t status_ = cudaSuccess;
  int64_t n_[3], bytes_ = 0;
  const Real *weights_[TCAM_MAX_LAYERS + 1] = {}, *biases_[TCAM_MAX_LAYERS + 1] = {};
  Real *da_ = nullptr, *db_ = nullptr, *dg_ = nullptr;
  Real *grad_weight_[TCAM_MAX_LAYERS + 1] = {}, *grad_bias_[TCAM_MAX_LAYERS + 1] = {};  // of the object; null: not there
  char* cleared_ = nullptr;  // the partial sums of the decoder's gradients
  int64_t cleared_bytes_ = 0, partials_begin_ = 0;

  Planes(const tcam_problem& problem, cudaStream_t stream) : p(problem), stream_(stream) {
    for (int a = 0; a < 3; ++a) n_[a] = p.hi[a] - p.lo[a];
  }

  // A subclass's own part: from the projections of an object to its volume or losses; backward also adds to dA, dB, dG and to
  // the partial sums of layers 2 and up, which write_gradients makes gradients of.
  virtual void walk(int64_t object, void* volume, const tcam_objective* objective, double* losses, bool backward) = 0;
  virtual void write_gradients() = 0;
  virtual void look_at(const void*, const tcam_objective*) {}                 // at the gradient or the target, before backward
  virtual int64_t places() const { return p.batch * n_[0] * n_[1] * n_[2]; }  // that are decoded, of all objects

  Hidden<Real> activation(int layer) const {  // of layers 1 to L-1; any for layer 0
    const tcam_activation& a = p.activation[layer > 0 ? layer - 1 : 0];
    return {static_cast<Activation>(a.kind), static_cast<Real>(a.parameter)};
  }
  Final<Real> output_activation() const {
    return {static_cast<OutputActivation>(p.output_activation.kind), static_cast<Real>(p.output_activation.parameter)};
  }
  int width(int layer) const { return static_cast<int>(p.width[layer]); }
  int64_t rows(int q) const { return p.planes[q].rows; }
  int64_t columns(int q) const { return p.planes[q].columns; }
  int64_t texels(int q) const { return rows(q) * columns(q); }
  // Which map a plane is part of: 0: A (x, y), 1: B (y, z), 2: G (x, z).
  int map_of(int q) const { return p.planes[q].row_axis == 1 ? 1 : p.planes[q].column_axis == 1 ? 0 : 2; }

  // The projected planes of a map (-1: all).
  PlaneList<Real> projected(int map) const {
    PlaneList<Real> list = {};
    for (int q = 0; q < p.plane_count; ++q) {
      if (map >= 0 && map_of(q) != map) continue;
      const int e = list.count++;
      list.plane[e] = projected_[q];
      list.columns[e] = static_cast<int>(columns(q));
      list.row_axis[e] = p.planes[q].row_axis, list.column_axis[e] = p.planes[q].column_axis;
      list.rows_at[e] = row_taps_[q], list.columns_at[e] = column_taps_[q];
    }
    return list;
  }
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
    auto taps = [&](int axis) {
      return reinterpret_cast<VoxelTap<Real>*>(ws.take(n_[axis] * static_cast<int64_t>(sizeof(VoxelTap<Real>))));
    };
    for (int q = 0; q < p.plane_count; ++q) {
      row_taps_[q] = taps(p.planes[q].row_axis);
      column_taps_[q] = taps(p.planes[q].column_axis);
      projected_[q] = reals(ws, texels(q) * n1);
    }
    if (!backward) return;
    da_ = reals(ws, n_[0] * n_[1] * n1);
    db_ = reals(ws, n_[1] * n_[2] * n1);
    dg_ = reals(ws, n_[0] * n_[2] * n1);
    int64_t most_between = 0, most_texels = 0;
    for (int q = 0; q < p.plane_count; ++q) {
      const int64_t between = rows(q) * n_[p.planes[q].column_axis];
      most_between = between > most_between ? between : most_between;
      most_texels = texels(q) > most_texels ? texels(q) : most_texels;
    }
    between_ = reals(ws, most_between * n1);
    grad_projected_ = reals(ws, most_texels * n1);
  }
  // After it a subclass takes its own partial sums, and calls end_partials.
  void begin_partials(Carver& ws) {
    partials_begin_ = ws.used();
    for (int b = 0; b < first_blocks(); ++b) first_partials_[b] = reals(ws, texel_splits * width(1) * p.channels);
    first_bias_partials_ = reals(ws, row_splits * width(1));
  }
  void end_partials(Carver& ws, void* workspace) {
    cleared_ = static_cast<char*>(workspace) + partials_begin_;
    cleared_bytes_ = ws.used() - partials_begin_;
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

  VoxelTap<Real>*row_taps_[TCAM_MAX_PLANES] = {}, *column_taps_[TCAM_MAX_PLANES] = {};
  Real* projected_[TCAM_MAX_PLANES] = {};
  Real *first_partials_[TCAM_MAX_PLANES + 1] = {}, *first_bias_partials_ = nullptr;  // points.cuh has a block more
  Real *between_ = nullptr, *grad_projected_ = nullptr;
  bool ascending_ = true;  // the taps

  void set_layers(const tcam_inputs& in) {
    for (int l = 1; l <= p.layers; ++l) {
      weights_[l] = static_cast<const Real*>(in.weights[l - 1]);
      biases_[l] = static_cast<const Real*>(in.biases[l - 1]);
    }
  }
  // Where the decoder's gradients go, of `row` of those that have a leading axis.
  void place_gradients(const tcam_gradients& to, int64_t row) {
    for (int l = 1; l <= p.layers; ++l) {
      Real* bias = static_cast<Real*>(to.biases[l - 1]);
      grad_weight_[l] = static_cast<Real*>(to.weights[l - 1]) + row * p.width[l] * p.width[l - 1];
      grad_bias_[l] = bias ? bias + row * p.width[l] : nullptr;
    }
  }

  void set(const tcam_inputs& in) {
    set_layers(in);
    ascending_ = p.padding != TCAM_PAD_REFLECTION && !in.bounds;
    if (!in.bounds) place(nullptr);
  }

  void place(const double* bounds) {
    for (int q = 0; q < p.plane_count; ++q)
      for (bool row : {true, false}) {
        const int a = row ? p.planes[q].row_axis : p.planes[q].column_axis;
        const Axis axis = {static_cast<int>(row ? rows(q) : columns(q)), p.align_corners != 0, p.padding};
        check(launch(taps_kernel<Real>, blocks(ceil_div(n_[a], threads)), threads, 0, stream_, p.lo[a], n_[a], p.size[a], axis,
                     p.corners != 0, bounds ? bounds + 2 * a : nullptr, row ? p.plane_scale : 1.,
                     row ? row_taps_[q] : column_taps_[q]));
      }
  }

  const Real* plane(const void* const* planes, int q, int64_t object) const {
    return static_cast<const Real*>(planes[q]) + object * p.channels * texels(q);
  }
  // W_1 = [W_0 | W_1 | ...], a block of columns for each plane, or one for their sum.
  int first_blocks() const { return p.reduce == TCAM_CONCAT ? p.plane_count : 1; }
  int first_block(int q) const { return p.reduce == TCAM_CONCAT ? q : 0; }
  const Real* first_weight(int q) const { return weights_[1] + first_block(q) * p.channels; }

  void project(const tcam_inputs& in, int64_t object) {
    if (in.bounds) place(in.bounds + object * 6);
    for (int q = 0; q < p.plane_count; ++q)
      check(gemm<Scalars<Real, 64>>(
          texels(q), width(1), p.channels, 0, Transposed<Real>{plane(in.planes, q, object), texels(q)},
          Transposed<Real>{first_weight(q), p.width[0]}, WriteRows<Real>{projected_[q], width(1), nullptr}, stream_));
  }

  void gather(const Real* in, const VoxelTap<Real>* taps, int64_t count, int64_t texels, int64_t ny, int64_t x_step,
              int64_t y_step, Real* out, int64_t r_step, int64_t y_out) {
    check(launch(gather_axis_kernel<Real>, blocks(texels * ny), channel_threads(width(1)), 0, stream_, in, taps, ascending_,
                 count, width(1), static_cast<int>(texels), ny, x_step, y_step, out, r_step, y_out));
  }

  void maps_to_planes(const tcam_inputs& in, const tcam_gradients& to, int64_t object) {
    const Real* maps[3] = {da_, db_, dg_};
    for (int q = 0; q < p.plane_count; ++q) {
      const int64_t nu = n_[p.planes[q].row_axis], nv = n_[p.planes[q].column_axis];
      gather(maps[map_of(q)], row_taps_[q], nu, rows(q), nv, nv, 1, between_, nv, 1);  // voxels to texels along rows,
      gather(between_, column_taps_[q], nv, columns(q), rows(q), 1, nv, grad_projected_, 1, columns(q));  // then along columns
      if (p.grad_decoder)
        check(gemm<Scalars<Real, 64>>(width(1), static_cast<int>(p.channels), texels(q), texel_chunk(q),
                                      Transposed<Real>{grad_projected_, width(1)},
                                      Transposed<Real>{plane(in.planes, q, object), texels(q)},
                                      AddPartial<Real>{first_partials_[first_block(q)], width(1), p.channels}, stream_));
      if (p.grad_planes)
        check(gemm<Scalars<Real, 64>>(
            texels(q), static_cast<int>(p.channels), width(1), 0, Rows<Real>{grad_projected_, width(1)},
            Rows<Real>{first_weight(q), p.width[0]},
            WriteTransposed<Real>{static_cast<Real*>(to.planes[q]) + object * p.channels * texels(q), texels(q)}, stream_));
    }
    if (p.grad_decoder)
      check(launch(add_column_sums_kernel<Real>, static_cast<unsigned>(ceil_div(n_[0] * n_[1], row_chunk())),
                   channel_threads(width(1)), 0, stream_, da_, n_[0] * n_[1], width(1), row_chunk(), first_bias_partials_));
  }

  void write_first_gradients() {
    const int64_t n1 = width(1);
    for (int b = 0; b < first_blocks(); ++b)
      combine({first_partials_[b], texel_splits, n1 * p.channels, p.channels}, n1, p.channels, nullptr,
              grad_weight_[1] + b * p.channels, p.width[0]);
    if (grad_bias_[1]) combine({first_bias_partials_, row_splits, n1, n1}, 1, n1, nullptr, grad_bias_[1], n1);
  }
};

}  // namespace tcam
