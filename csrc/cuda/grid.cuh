// The first layer of a grid. Sampling and the first layer are both linear and commute, so each plane is first projected: its
// texels are multiplied by the plane's block of W_1. z_1 at a voxel is then the sum of the samples of the projected planes. The
// MLP takes z_1 itself (Mlp), or three maps whose sum it is (FusedMlp): A (i, j), B (j, k), G (i, k).
//
// Backward sums delta_1, the gradient of z_1, over k, i and j into the gradients of these maps, dA, dB and dG. Each texel then
// gathers the voxels that read it. No sum needs atomics, and each has one order.
#pragma once
#include <type_traits>

#include "../formulation.h"
#include "context.cuh"
#include "fused_mlp.cuh"
#include "grid_kernels.cuh"

namespace tcam {

template <class Real_>
class Grid {
 public:
  using Real = Real_;

  explicit Grid(Context<Real>& context) : c(context), p(context.p) {
    for (int a = 0; a < 3; ++a) n_[a] = p.hi[a] - p.lo[a];
  }

  const int64_t* box() const { return n_; }
  int64_t rounds() const { return p.batch; }  // objects, one after another
  int64_t voxel_bytes() const { return 0; }   // workspace for a voxel of a region, beside the MLP's
  // Workspace for one i of a slab: partial_a_ and partial_g_.
  int64_t slice_bytes() const {
    return (n_[1] * tiles() + most_parts() * n_[2]) * c.first_width() * static_cast<int64_t>(sizeof(Real));
  }

  // Takes the arrays from the workspace. Input is the type of the MLP's input: Real* for Mlp, FusedInput for FusedMlp.
  template <class Input>
  void carve(Carver& ws, const Regions& regions) {
    const int n1 = c.first_width();
    int64_t most_between = 0, most_texels = 0;
    for (int q = 0; q < p.plane_count; ++q) {
      row_taps_[q] = ws.array<VoxelTap<Real>>(n_[p.planes[q].row_axis]);
      column_taps_[q] = ws.array<VoxelTap<Real>>(n_[p.planes[q].column_axis]);
      projected_[q] = ws.array<Real>(texels(q) * n1);
      const int64_t between = rows(q) * n_[p.planes[q].column_axis];
      most_between = between > most_between ? between : most_between;
      most_texels = texels(q) > most_texels ? texels(q) : most_texels;
    }
    if (!c.backward) return;
    for (int m = 0; m < 3; ++m) grad_maps_[m] = ws.array<Real>(map_texels(m) * n1);
    between_ = ws.array<Real>(most_between * n1);
    grad_projected_ = ws.array<Real>(most_texels * n1);
    if (!std::is_same<Input, FusedInput>::value) return;
    partial_a_ = ws.array<Real>(regions.size[0] * n_[1] * tiles() * n1);
    partial_g_ = ws.array<Real>(regions.size[0] * most_parts() * n_[2] * n1);
  }
  void carve_partials(Carver& ws) {
    for (int b = 0; b < blocks(); ++b) weight_partials_[b] = ws.array<Real>(texel_splits * c.first_width() * p.channels);
    bias_partials_ = ws.array<Real>(row_splits * c.first_width());
  }

  // Projects the planes of an object.
  void begin(const tcam_inputs& in, int64_t object, const Volume&) {
    if (in.bounds || object == 0) place(in.bounds ? in.bounds + object * 6 : nullptr);
    ascending_ = p.padding != TCAM_PAD_REFLECTION && !in.bounds;
    for (int q = 0; q < p.plane_count; ++q)
      c.texel_product(texels(q), c.first_width(), p.channels, 0, Transposed<Real>{plane(in.planes, q, object), texels(q)},
                      Transposed<Real>{weight(q), p.width[0]}, WriteRows<Real>{projected_[q], c.first_width(), nullptr});
  }
  void begin_gradients() {
    for (int m = 0; m < 3; ++m) c.clear(grad_maps_[m], map_texels(m) * c.first_width() * sizeof(Real));
  }

  // With Mlp: forward samples z_1 of a region from the projected planes, z (voxels of the region, n_1); backward adds its
  // delta_1, of the same shape, to dA, dB and dG.
  void forward(const Region& region, Real* z) {
    const Sampled<Real> sampled = {projected(-1), c.biases[1], c.first_width()};
    constexpr int vector = 16 / sizeof(Real);
    c.run_warps(sampled.n % vector ? first_layer_kernel<Real, 1> : first_layer_kernel<Real, vector>,
                ceil_div(region.voxels(), first_layer_run), sampled, region, z);
  }
  void backward(const Region& r, const Real* delta, const tcam_gradients&) {
    const int64_t row = r.nk, slice = row * r.nj;
    const int n1 = c.first_width();
    add_axis_sum(delta, grad_maps_[0] + (r.i0 * n_[1] + r.j0) * n1, n_[1], r.ni, r.nj, r.nk, slice, row, 1);
    add_axis_sum(delta, grad_maps_[1] + (r.j0 * n_[2] + r.k0) * n1, n_[2], r.nj, r.nk, r.ni, row, 1, slice);
    add_axis_sum(delta, grad_maps_[2] + (r.i0 * n_[2] + r.k0) * n1, n_[2], r.ni, r.nk, r.nj, slice, 1, row);
  }

  // With FusedMlp: forward samples the maps A and G of a slab of i, and for the first slab also B; backward adds the slab's
  // delta_1 to dA, dB and dG.
  void forward(const Region& slab, const FusedInput& to) {
    with_format(to.bfloat, [&](auto format) {
      using T = decltype(format);
      if (slab.i0 == 0) map<T>(1, 0, n_[1], nullptr, to, to.b);
      map<T>(0, slab.i0, slab.ni, c.biases[1], to, to.a);
      map<T>(2, slab.i0, slab.ni, nullptr, to, to.g);
    });
  }
  void backward(const Region& slab, const FusedDelta& delta, const tcam_gradients&) {
    with_format(delta.bfloat, [&](auto format) { sum_delta1<decltype(format)>(slab.i0, slab.ni, delta); });
  }

  // Computes the gradients of the object's planes from dA, dB and dG, and adds to the partial sums of W_1 and b_1.
  void end(const tcam_inputs& in, int64_t object, const tcam_gradients& to) {
    const int n1 = c.first_width(), channels = static_cast<int>(p.channels);
    for (int q = 0; q < p.plane_count; ++q) {
      const int64_t nu = n_[p.planes[q].row_axis], nv = n_[p.planes[q].column_axis];
      gather(grad_maps_[map_of(q)], row_taps_[q], nu, rows(q), nv, nv, 1, between_, nv, 1);  // voxels to texels down the rows,
      gather(between_, column_taps_[q], nv, columns(q), rows(q), 1, nv, grad_projected_, 1, columns(q));  // then the columns
      if (p.grad_decoder)
        c.texel_product(n1, channels, texels(q), ceil_div(texels(q), texel_splits), Transposed<Real>{grad_projected_, n1},
                        Transposed<Real>{plane(in.planes, q, object), texels(q)},
                        AddPartial<Real>{weight_partials_[block(q)], n1, p.channels, nullptr});
      if (p.grad_planes)
        c.texel_product(texels(q), channels, n1, 0, Rows<Real>{grad_projected_, n1}, Rows<Real>{weight(q), p.width[0]},
                        WriteTransposed<Real>{static_cast<Real*>(to.planes[q]) + object * p.channels * texels(q), texels(q)});
    }
    if (p.grad_decoder)
      c.add_column_sums(grad_maps_[0], map_texels(0), n1, ceil_div(map_texels(0), row_splits), bias_partials_);
  }
  void write_gradients() {
    const int64_t n1 = c.first_width();
    for (int b = 0; b < blocks(); ++b)
      c.combine({weight_partials_[b], texel_splits, n1 * p.channels, p.channels}, n1, p.channels, nullptr,
                c.grad_weights[1] + b * p.channels, p.width[0]);
    if (c.grad_biases[1]) c.combine({bias_partials_, row_splits, n1, n1}, 1, n1, nullptr, c.grad_biases[1], n1);
  }

 private:
  static constexpr int64_t row_splits = 64;  // partial sums of b_1's gradient, over the rows of dA

  Context<Real>& c;
  const tcam_problem& p;
  int64_t n_[3];  // voxels of the box along i, j, k
  // Taps of the box's voxels on each plane's rows and columns.
  VoxelTap<Real>*row_taps_[TCAM_MAX_PLANES] = {}, *column_taps_[TCAM_MAX_PLANES] = {};
  bool ascending_ = true;  // whether the taps' texels ascend with the voxels
  // projected_[q] (rows, columns, n_1); grad_maps_: dA, dB, dG; between_ (rows, voxels of the column axis, n_1) and
  // grad_projected_ (rows, columns, n_1): of one plane at a time.
  Real *projected_[TCAM_MAX_PLANES] = {}, *grad_maps_[3] = {}, *between_ = nullptr, *grad_projected_ = nullptr;
  // Partial sums of delta_sums_kernel.
  Real *partial_a_ = nullptr, *partial_g_ = nullptr;
  Real *weight_partials_[TCAM_MAX_PLANES] = {}, *bias_partials_ = nullptr;

  int64_t rows(int q) const { return p.planes[q].rows; }
  int64_t columns(int q) const { return p.planes[q].columns; }
  int64_t texels(int q) const { return rows(q) * columns(q); }
  int64_t tiles() const { return ceil_div(n_[2], sum_tile); }  // of k, in delta_sums_kernel
  const Real* plane(const void* const* planes, int q, int64_t object) const {
    return static_cast<const Real*>(planes[q]) + object * p.channels * texels(q);
  }
  int blocks() const { return p.group_count; }  // of W_1's columns: one for each group of planes
  int block(int q) const { return p.planes[q].group; }
  const Real* weight(int q) const { return c.weights[1] + block(q) * p.channels; }

  // The map to which plane q contributes: 0: A (i, j), 1: B (j, k), 2: G (i, k).
  int map_of(int q) const { return p.planes[q].row_axis == 1 ? 1 : p.planes[q].column_axis == 1 ? 0 : 2; }
  int64_t map_texels(int map) const { return n_[map == 1] * n_[map == 0 ? 1 : 2]; }
  // The projected planes that contribute to a map; -1: all planes.
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

  void place(const double* bounds) {
    for (int q = 0; q < p.plane_count; ++q)
      for (bool row : {true, false}) {
        const int a = row ? p.planes[q].row_axis : p.planes[q].column_axis;
        const Axis axis = {static_cast<int>(row ? rows(q) : columns(q)), p.align_corners != 0, p.padding};
        c.run_elements(taps_kernel<Real>, n_[a], p.lo[a], n_[a], p.size[a], axis, p.corners != 0,
                       bounds ? bounds + 2 * a : nullptr, row ? plane_scale(p, q) : 1., row ? row_taps_[q] : column_taps_[q]);
      }
  }

  // Rows [x0, x0 + nx) of map `which` in the fused kernels' format T: out (nx, ny, to.channels).
  template <class T>
  void map(int which, int64_t x0, int64_t nx, const Real* bias, const FusedInput& to, uint16_t* out) {
    const int64_t ny = n_[which == 0 ? 1 : 2];
    c.run_warps(map_kernel<T>, nx * ny, projected(which), c.first_width(), to.channels, x0, nx, ny, bias, out);
  }

  // The parts of j in delta_sums_kernel: of the numbers up to most_parts(), the first that takes the fewest steps. A
  // multiprocessor runs one block at a time. A block takes a step for each of its j, and the time of about 4 steps to fill its
  // shared memory and to write its sums over j.
  int64_t most_parts() const { return tiles() < 128 ? (128 / tiles() < n_[1] ? 128 / tiles() : n_[1]) : 1; }
  int64_t parts(int64_t columns, int64_t processors) const {
    auto steps = [&](int64_t parts) { return ceil_div(columns * parts, processors) * (ceil_div(n_[1], parts) + 4); };
    int64_t best = 1;
    for (int64_t other = 2; other <= most_parts(); ++other)
      if (steps(other) < steps(best)) best = other;
    return best;
  }
  template <class T>
  void sum_delta1(int64_t i0, int64_t ni, const FusedDelta& delta) {
    const int64_t nj = n_[1], nk = n_[2], n1 = c.first_width(), columns = tiles() * (delta.channels / sum_channels);
    const int64_t all = parts(columns, delta.processors);
    auto kernel = delta.channels == 64 ? delta_sums_kernel<T, 64> : delta_sums_kernel<T, 128>;
    c.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(delta_sums_bytes)));
    c.run(kernel, dim3(static_cast<unsigned>(columns), static_cast<unsigned>(all)), threads, delta_sums_bytes, delta.rows,
          static_cast<int>(ni), static_cast<int>(nj), static_cast<int>(nk), c.first_width(), delta.factor, grad_maps_[1],
          partial_a_, partial_g_);
    add_axis_sum(partial_a_, grad_maps_[0] + i0 * nj * n1, nj, ni, nj, tiles(), nj * tiles(), tiles(), 1);
    add_axis_sum(partial_g_, grad_maps_[2] + i0 * nk * n1, nk, ni, nk, all, all * nk, 1, nk);
  }

  void add_axis_sum(const Real* in, Real* map, int64_t pitch, int64_t nx, int64_t ny, int64_t ns, int64_t x_step,
                    int64_t y_step, int64_t s_step) {
    constexpr int vector = 16 / sizeof(Real);
    const int n = c.first_width(), group = n % vector ? 1 : vector;
    int lanes = 1, slices = 1;
    while (lanes < threads && lanes * group < n) lanes *= 2;
    while (slices * lanes < threads && slices * 16 < ns) slices *= 2;
    c.run(group == 1 ? add_axis_sum_kernel<Real, 1> : add_axis_sum_kernel<Real, vector>,
          c.blocks(ceil_div(nx * ny, threads / (lanes * slices))), threads, threads * group * sizeof(Real) + 16, in, n,
          static_cast<int>(nx), static_cast<int>(ny), static_cast<int>(ns), x_step, y_step, s_step, map, pitch, lanes, slices);
  }
  void gather(const Real* in, const VoxelTap<Real>* taps, int64_t count, int64_t texels, int64_t ny, int64_t x_step,
              int64_t y_step, Real* out, int64_t r_step, int64_t y_out) {
    c.run(gather_axis_kernel<Real>, c.blocks(texels * ny), c.channel_threads(c.first_width()), 0, in, taps, ascending_, count,
          c.first_width(), static_cast<int>(texels), ny, x_step, y_step, out, r_step, y_out);
  }
};

}  // namespace tcam
