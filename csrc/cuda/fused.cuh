// decode_grid on the fused kernels: tensor cores over slabs of i whose maps, masks and delta_1 fit a fixed workspace.
#pragma once
#include "fused_mlp.cuh"

namespace tcam {

constexpr int64_t slab_bytes_forward = 256ll << 20, slab_bytes_backward = 1152ll << 20;

class Fused : public FusedMlp<Planes<float>> {
 public:
  Fused(const tcam_problem& problem, bool backward, void* workspace, cudaStream_t stream) : FusedMlp(problem, stream) {
    look_at_shape();
    if (n_[0] > INT32_MAX / n_[1] || n_[0] * n_[1] > INT32_MAX / ceil_div(n_[2], 32))
      refusal_ = {"they count tiles of 32 voxels in 31 bits", 0, 0};
    if (refusal_.why) return;
    Carver ws(workspace);
    carve_planes(ws, backward);
    carve(ws, backward, workspace);
    bytes_ = ws.used();
  }

 private:
  int64_t slab_ = 0;
  uint16_t* maps_[3] = {};  // A and G of a slab of i, B of the volume
  float *partial_a_ = nullptr, *partial_g_ = nullptr;

  FusedMaps slab_maps(int64_t ni) const {
    return {maps_[0], maps_[1], maps_[2], static_cast<int>(ni), static_cast<int>(n_[1]), static_cast<int>(n_[2])};
  }
  // Steps of the backward kernel in `ni` planes.
  int64_t steps(int64_t ni) const { return fused_backward_steps(slab_maps(ni)); }
  int64_t tiles(int axis) const { return ceil_div(n_[axis], sum_tile); }

  void carve(Carver& ws, bool backward, void* workspace) {
    const int64_t N = N_, voxels = n_[1] * n_[2], wide = fused_backward_wide;
    auto halves = [&](int64_t count) { return reinterpret_cast<uint16_t*>(ws.take(count * 2)); };
    int64_t each = (n_[1] + n_[2]) * N * 2, budget = slab_bytes_forward;
    if (backward) {  // steps round i up to `wide` and k to 32
      const int64_t padded = steps(wide) * fused_backward_chain_threads / wide;
      each += padded * (16 * products() + 4 * n_out()) + voxels * N * 2;
      each += (n_[1] * tiles(2) + tiles(1) * n_[2]) * width(1) * 4;
      budget = slab_bytes_backward;
    }
    slab_ = budget / each;
    if (backward && p.tile > 0 && slab_ > p.tile / voxels) slab_ = p.tile / voxels;
    if (slab_ > wide) slab_ = slab_ / wide * wide;
    if (slab_ < wide) slab_ = wide;
    if (slab_ > n_[0]) slab_ = n_[0];

    maps_[0] = halves(slab_ * n_[1] * N);
    maps_[1] = halves(n_[1] * n_[2] * N);
    maps_[2] = halves(slab_ * n_[2] * N);
    carve_mlp(ws, backward, steps(slab_), slab_ * voxels);
    if (!backward) return;
    partial_a_ = reals(ws, slab_ * n_[1] * tiles(2) * width(1));
    partial_g_ = reals(ws, slab_ * tiles(1) * n_[2] * width(1));
    if (!p.grad_decoder) return;
    begin_partials(ws);
    carve_sums(ws, steps(slab_));
    end_partials(ws, workspace);
  }

  void walk(int64_t object, void* volume, const tcam_objective* objective, double* losses, bool backward) override {
    if (bfloat())
      walk_in<ptx::BFloat16>(object, volume, objective, losses, backward);
    else
      walk_in<ptx::Float16>(object, volume, objective, losses, backward);
  }

  template <class T>
  void walk_in(int64_t object, void* volume, const tcam_objective* objective, double* losses, bool backward) {
    const int dtype = objective ? objective->target_dtype : p.out_dtype;
    if (object == 0) pad<T>(backward);
    map<T>(1, 0, n_[1], nullptr);
    const int64_t voxels = n_[0] * n_[1] * n_[2];
    for (int64_t i0 = 0; i0 < n_[0] && !status_; i0 += slab_) {
      const int64_t ni = n_[0] - i0 < slab_ ? n_[0] - i0 : slab_;
      map<T>(0, i0, ni, biases_[1]);
      map<T>(2, i0, ni, nullptr);
      char* at = static_cast<char*>(volume) + (object * n_out() * voxels + i0 * n_[1] * n_[2]) * dtype_bytes(dtype);
      run<T>(slab_maps(ni), at, dtype, voxels, 1, objective, losses + object, backward);
      if (backward) sum_delta1<T>(i0, ni);
    }
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

  // Map q (0: A, 1: B, 2: G) at the `nx` rows from x0 on.
  template <class T>
  void map(int q, int64_t x0, int64_t nx, const float* bias) {
    const int64_t ny = n_[q == 0 ? 1 : 2];
    check(launch(map_kernel<T>, blocks(ceil_div(nx * ny, warps)), threads, 0, stream_, projected(q), width(1), N_, x0, nx, ny,
                 bias, maps_[q]));
  }
};

}  // namespace tcam
