// The MLP above the first layer on tensor cores, for z_1 in rows: the points of a wave.
//
// The fused kernels compute h_1(i,j,k) = relu(A[i,j] + B[j,k] + G[i,k]) on a grid. A wave of points is passed to them as a grid
// of size (points / 32, 1, 32), where G is the points' rounded z_1 and A and B are zero. The remaining points are a second
// grid, of size (1, 1, points % 32).
#pragma once
#include "fused_mlp.cuh"

namespace tcam {

class FusedRows {
 public:
  using Input = float*;  // z_1: (points of a wave, width of layer 1)

  explicit FusedRows(Context<float>& context) : c(context), p(context.p), mlp_(context) {}

  Refusal refuses(const int64_t*) const { return fused_refusal(p); }
  Refusal refuses(Output output, const Device& device) { return mlp_.refuses(output, device); }
  void describe(Output output, char* text, size_t size) const { mlp_.describe(output, text, size); }

  template <class First>
  Regions regions(const First& first) const {
    const int64_t each = first.voxel_bytes() + (c.backward ? bytes_backward : bytes_forward);
    const int64_t most = p.tile > 0 ? p.tile : most_points, fit = region_bytes / each;
    return Regions::of(first.box(), most < fit ? most : fit);
  }

  void carve(Carver& ws, const Regions& regions) {
    const int64_t most = regions.most(), n1 = c.width(1);
    z_ = ws.array<float>(most * n1);
    if (c.backward) delta_ = ws.array<float>(most * n1);
    if (!c.backward && n_out() > 1) planar_ = ws.array<float>(most * n_out());
    rows_ = point_rows(most);
    mlp_.carve(ws, {{rows_, 1, point_row}, {rows_, 1, point_row}});
  }
  void carve_partials(Carver& ws) { mlp_.carve_partials(ws); }

  void begin(const void* volume, const tcam_objective* objective, int64_t points) {
    mlp_.begin(volume, objective, points);
    const FusedInput maps = mlp_.input();
    c.clear(maps.a, rows_ * maps.channels * 2);
    c.clear(maps.b, point_row * maps.channels * 2);
  }
  Input input() const { return z_; }
  const float* delta() const { return delta_; }

  void forward(const Region& wave, const Volume& volume, const tcam_objective* objective, double* loss) {
    run(wave, volume, objective, loss, objective ? Output::losses : Output::volume);
  }
  void backward(const Region& wave, const Volume& volume, const tcam_objective* objective, double* loss) {
    run(wave, volume, objective, loss, Output::gradients);
  }
  void write_gradients() { mlp_.write_gradients(); }

 private:
  static constexpr int point_row = 32;             // voxels of a warp's tile along k
  static constexpr int64_t most_points = 1 << 17;  // points of a wave, by default
  // Bytes of workspace for a point: z_1 in float32 and rounded; in backward also delta_1 in both, masks and dl/dy.
  static constexpr int64_t bytes_forward = (4 + 2) * 128;
  static constexpr int64_t bytes_backward = 2 * bytes_forward + 16 * fused_most_products + 4 * fused_most_out;

  Context<float>& c;
  const tcam_problem& p;
  FusedMlp mlp_;
  // z_, delta_ (points of a wave, n_1): z_1 and delta_1; planar_ (n_out, points): outputs before they are interleaved.
  float *z_ = nullptr, *delta_ = nullptr, *planar_ = nullptr;
  int64_t rows_ = 0;  // rows of 32 points in the largest wave

  int n_out() const { return c.width(p.layers); }
  static int64_t point_rows(int64_t points) { return ceil_div(points, point_row); }

  // Rounds the wave's z_1 to rows of G, then runs the fused kernels over its full rows of 32 points and over the rest.
  void run(const Region& wave, const Volume& volume, const tcam_objective* objective, double* loss, Output output) {
    const int64_t count = wave.voxels(), whole = count / point_row * point_row;
    const FusedInput maps = mlp_.input();
    with_format(maps.bfloat, [&](auto format) {
      c.run_elements(round_rows_kernel<decltype(format)>, count * maps.channels, z_, count, c.width(1), maps.channels, maps.g);
    });
    part(wave, volume, objective, loss, output, 0, whole / point_row, point_row);
    part(wave, volume, objective, loss, output, whole, 1, count - whole);
  }

  // Runs the fused kernels over part of a wave: a grid of size (rows, 1, row) that begins at point `first`.
  void part(const Region& wave, Volume volume, const tcam_objective* objective, double* loss, Output output, int64_t first,
            int64_t rows, int64_t row) {
    const int64_t count = rows * row;
    if (count == 0) return;
    const FusedInput in = mlp_.input();
    const FusedMaps maps = {in.a, in.b, in.g + first * in.channels, static_cast<int>(rows), 1, static_cast<int>(row)};
    volume.data = static_cast<char*>(volume.data) + (wave.in_box(0) + first) * volume.voxel_stride * dtype_bytes(volume.dtype);
    if (output == Output::volume && volume.voxel_stride > 1) {  // the forward kernel writes only a voxel stride of 1
      mlp_.run(maps, {planar_, TCAM_F32, count, 1}, nullptr, nullptr, output);
      c.run_elements(interleave_kernel, count * n_out(), planar_, count, n_out(), volume.data, volume.dtype);
    } else {
      mlp_.run(maps, volume, objective, loss, output);
    }
    if (output != Output::gradients) return;
    const FusedDelta delta = mlp_.delta();
    with_format(delta.bfloat, [&](auto format) {
      c.run_elements(widen_rows_kernel<decltype(format)>, count * delta.channels, delta.rows, count, c.width(1), delta.channels,
                     delta.factor, delta_ + first * c.width(1));
    });
  }
};

}  // namespace tcam
