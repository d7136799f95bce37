// Points (and grids that go point by point) on the fused kernels: points.cuh with the layers above the first on tensor cores.
//
// The kernels walk grids, h_1(i,j,k) = relu(A[i,j] + B[j,k] + G[i,k]). A wave of points is a grid of one j and 32 k: G has the
// points' z_1, rounded, and A and B are zero.
#pragma once
#include "fused_mlp.cuh"
#include "points.cuh"

namespace tcam {

constexpr int point_row = 32;  // of a warp's tile
constexpr int64_t fused_wave_points = 1 << 17;
constexpr int64_t bytes_forward = (4 + 2) * 128;  // a point: z_1, and rounded; backward: also delta_1, masks and dl/dy
constexpr int64_t bytes_backward = 2 * bytes_forward + 16 * fused_most_products + 4 * fused_most_out;

// z (points, n) rounded to (points, padded), zero in the padding; and back, from rows in the order of delta1_column.
template <class T>
__global__ void __launch_bounds__(threads) round_rows_kernel(const float* z, int64_t count, int n, int padded, uint16_t* rows) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count * padded;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t t = e / padded, c = e % padded;
    rows[e] = T::round(c < n ? z[t * n + c] : 0.f);
  }
}
template <class T>
__global__ void __launch_bounds__(threads)
    widen_rows_kernel(const uint16_t* rows, int64_t count, int n, int padded, const float* factor, float* delta) {
  const float f = factor ? *factor : 1.f;
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count * padded;
       e += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t t = e / padded;
    const int c = delta1_column(static_cast<int>(e % padded));
    if (c < n) delta[t * n + c] = T::widen(rows[e]) * f;
  }
}

// (channels, points) to (points, channels) of a dtype.
static __global__ void __launch_bounds__(threads)
    interleave_kernel(const float* planar, int64_t count, int channels, void* out, int dtype) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < count * channels;
       e += static_cast<int64_t>(gridDim.x) * threads)
    Elements<float>::write(out, dtype, e, planar[e % channels * count + e / channels]);
}

class FusedPoints : public FusedMlp<PointLayers<float>> {
  using Layout = PointLayers<float>::Layout;

 public:
  FusedPoints(const tcam_problem& problem, bool backward, void* workspace, cudaStream_t stream)
      : FusedMlp(problem, backward, workspace, stream, backward ? bytes_backward : bytes_forward, fused_wave_points) {
    look_at_shape();
    if (refusal_.why) return;
    Carver ws(workspace);
    ws.take(bytes_);
    if (backward && p.grad_decoder) {  // beside those of the first layer, which come last
      carve_sums(ws, steps());
      end_partials(ws, workspace);
    }
    zeros_ = reinterpret_cast<uint16_t*>(ws.take(zero_rows() * N_ * 2));
    z_rows_ = reinterpret_cast<uint16_t*>(ws.take(most_ * N_ * 2));
    if (!backward && n_out() > 1) planar_ = reals(ws, most_ * n_out());
    carve_mlp(ws, backward, steps(), most_);
    bytes_ = ws.used();
  }

 private:
  uint16_t *zeros_ = nullptr, *z_rows_ = nullptr;
  float* planar_ = nullptr;
  bool ready_ = false;

  int64_t point_rows() const { return ceil_div(most_, point_row); }
  int64_t zero_rows() const { return point_rows() > point_row ? point_rows() : point_row; }
  FusedMaps maps(int64_t first, int64_t rows, int64_t row) const {
    return {zeros_, zeros_, z_rows_ + first * N_, static_cast<int>(rows), 1, static_cast<int>(row)};
  }
  int64_t steps() const { return fused_backward_steps(maps(0, point_rows(), point_row)); }

  void decode(const Region& region, const Layout& out, const tcam_objective* objective, double* loss) override {
    if (bfloat())
      decode_in<ptx::BFloat16>(region, out, objective, loss, false);
    else
      decode_in<ptx::Float16>(region, out, objective, loss, false);
  }
  void decode_back(const Region& region, const Layout& out, const tcam_objective* objective, double* loss) override {
    if (bfloat())
      decode_in<ptx::BFloat16>(region, out, objective, loss, true);
    else
      decode_in<ptx::Float16>(region, out, objective, loss, true);
  }

  template <class T>
  void decode_in(const Region& region, const Layout& out, const tcam_objective* objective, double* loss, bool backward) {
    const int64_t count = region.voxels(), whole = count / point_row * point_row;
    const int dtype = objective ? objective->target_dtype : p.out_dtype;
    if (!ready_) {
      ready_ = true;
      pad<T>(backward);
      clear(zeros_, zero_rows() * N_ * 2);
    }
    const unsigned grid = blocks(ceil_div(count * N_, threads));
    check(launch(round_rows_kernel<T>, grid, threads, 0, stream_, z_[1], count, width(1), N_, z_rows_));
    auto part = [&](int64_t first, int64_t rows, int64_t row) {
      if (rows * row == 0) return;
      char* at = static_cast<char*>(out.data) + (region.k0 + first) * out.voxel_stride * dtype_bytes(dtype);
      const bool interleaved = !backward && !objective && out.voxel_stride > 1;  // which the forward kernel does not write
      if (interleaved)
        run<T>(maps(first, rows, row), planar_, TCAM_F32, rows * row, 1, nullptr, nullptr, false);
      else
        run<T>(maps(first, rows, row), at, dtype, out.channel_stride, out.voxel_stride, objective, loss, backward);
      if (interleaved)
        check(launch(interleave_kernel, blocks(ceil_div(rows * row * n_out(), threads)), threads, 0, stream_, planar_,
                     rows * row, n_out(), at, dtype));
      if (backward)
        check(launch(widen_rows_kernel<T>, blocks(ceil_div(rows * row * N_, threads)), threads, 0, stream_, delta1_, rows * row,
                     width(1), N_, factor_, delta_[1] + first * width(1)));
    };
    part(0, whole / point_row, point_row);
    part(whole, 1, count - whole);
  }
};

}  // namespace tcam
