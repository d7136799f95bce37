// The kernels of mlp.cuh: functors for the products of gemm.cuh, and the last layer.
#pragma once
#include "../maths/half.h"
#include "../maths/loss.h"
#include "region.cuh"
#include "sums.cuh"

namespace tcam {

// ---- operands of the products ----------------------------------------------------------------

// A operand or B operand: element (r, c) is activation(data[r * pitch + c]); rows are voxels.
template <class Real>
struct Activated {
  static constexpr bool columns_adjacent = true;
  const Real* data;
  int64_t pitch;
  Hidden<Real> activation;
  TCAM_DEVICE bool rare() const { return !slope_from_value(activation.kind); }
  TCAM_DEVICE Real rare_value(Real x) const { return Maths<Scalar<Real>>::value(activation, x); }
  template <int count>
  TCAM_DEVICE void usual(Real (&x)[count]) const {  // relu or leaky_relu, chosen once for the group
    if (activation.kind == Activation::relu) {
#pragma unroll
      for (int i = 0; i < count; ++i) x[i] = x[i] < 0 ? Real(0) : x[i];
    } else {
#pragma unroll
      for (int i = 0; i < count; ++i) x[i] = x[i] < 0 ? x[i] * activation.p : x[i];
    }
  }
};

// The activation's derivative at z; at kinks, as maths/activation.h defines it.
template <class Real>
TCAM_DEVICE Real slope_at(Hidden<Real> activation, Real z) {
  using M = Maths<Scalar<Real>>;
  const Real value = M::value(activation, z);
  return slope_from_value(activation.kind) ? M::slope_of_value(activation, value) : M::slope(activation, z, value);
}

// Store: out[r, c] = sum * activation'(z[r, c]). out, z: (voxels, pitch).
template <class Real>
struct WriteDelta {
  static constexpr bool sums_rows = false, has_rare = true;
  Real* out;
  const Real* z;
  int64_t pitch;
  Hidden<Real> activation;
  bool can_use_vectors() const { return on_vectors(out, pitch) && on_vectors(z, pitch); }
  TCAM_DEVICE Real* at(int, int64_t r, int c) const { return out + r * pitch + c; }
  TCAM_DEVICE const Real* reads(int, int64_t r, int c) const { return z + r * pitch + c; }
  TCAM_DEVICE bool rare() const { return !slope_from_value(activation.kind); }
  TCAM_DEVICE Real rare_value(Real sum, Real z) const { return sum * slope_at(activation, z); }
  TCAM_DEVICE Real value(Real sum, Real z) const {  // relu and leaky_relu keep the sign of z
    return rare() ? sum : sum * Maths<Scalar<Real>>::slope_of_value(activation, z);
  }
};

// ---- layers that read the features -----------------------------------------------------------

// out[v, c] = in[v, c] + bias[c] (null: 0) for n columns of rows that are `in_pitch` and `out_pitch` numbers apart. A thread
// owns an element.
template <class Real>
__global__ void __launch_bounds__(threads) copy_columns_kernel(const Real* in, int64_t in_pitch, int64_t voxels, int n,
                                                               const Real* bias, Real* out, int64_t out_pitch) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; e < voxels * n;
       e += static_cast<int64_t>(gridDim.x) * threads)
    out[e / n * out_pitch + e % n] = in[e / n * in_pitch + e % n] + (bias ? bias[e % n] : Real(0));
}

// ---- the last layer --------------------------------------------------------------------------

// What last_layer_kernel does with an output: writes it; reads its gradient; compares it with a target.
enum class Finish { write, gradient, compare };

// Arguments of last_layer_kernel. Without a weight, z is the output before its activation, and n_in its width.
template <class Real>
struct LastLayer {
  const Real *z, *weight, *bias;  // (voxels, n_in); (n_out, n_in); (n_out) or null
  int n_in, n_out;
  Hidden<Real> activation;
  Final<Real> output_activation;
  void* volume;  // the output, its gradient or the target, as `Finish` says
  int dtype;
  int64_t channel_stride, voxel_stride;
  Loss loss;
  double beta;
  Real* delta;     // (voxels, n_out): delta_L; null: not wanted
  double* losses;  // (voxels): each voxel's loss, summed over its outputs
};

// The last layer over a region: writes the output to the volume, or computes delta_L from it, and the losses. A warp owns a
// voxel and goes through its outputs; each lane sums every 32nd channel, then the lanes join by shuffles, in one order, and
// lane 0 writes. Without a weight each lane has every 32nd output.
template <class Real, Finish what>
__global__ void __launch_bounds__(threads) last_layer_kernel(LastLayer<Real> p, Region region) {
  using M = Maths<Scalar<Real>>;
  using L = LossMaths<Scalar<Real>>;
  const int lane = threadIdx.x % 32;
  for (int v = blockIdx.x * warps + threadIdx.x / 32; v < region.voxels(); v += gridDim.x * warps) {
    const Real* z = p.z + static_cast<int64_t>(v) * p.n_in;
    double total = 0;
    for (int o = p.weight ? 0 : lane; o < p.n_out; o += p.weight ? 1 : 32) {
      Real sum = 0;
      if (p.weight) {
        for (int c = lane; c < p.n_in; c += 32) sum += M::value(p.activation, z[c]) * p.weight[o * p.n_in + c];
        for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
        if (p.bias) sum += p.bias[o];
      } else {
        sum = z[o];
      }
      if (p.weight && lane) continue;
      const int64_t at = o * p.channel_stride + region.in_box(v) * p.voxel_stride;
      if (what == Finish::write) {
        Elements<Real>::write(p.volume, p.dtype, at, output_of<true>(p.output_activation, sum));
        continue;
      }
      Real delta = Elements<Real>::read(p.volume, p.dtype, at);
      if (what == Finish::compare) {
        const Real difference = output_of<true>(p.output_activation, sum) - delta;
        total += static_cast<double>(L::value(p.loss, difference, p.beta));
        delta = L::slope(p.loss, difference, p.beta);
      }
      if (p.delta) p.delta[static_cast<int64_t>(v) * p.n_out + o] = delta * output_slope_of<true>(p.output_activation, sum);
    }
    if constexpr (what == Finish::compare) {
      for (int other = 16; !p.weight && other; other /= 2) total += __shfl_xor_sync(0xffffffffu, total, other);
      if (lane == 0) p.losses[v] = total;
    }
  }
}

// out = (delta weight) * activation'(z), which is delta_(L-1). delta: (voxels, n_out); weight: (n_out, n); z, out: (voxels, n).
// A thread owns an element, a block's row of threads a voxel: n_out is small, so a tiled product would not pay. `across`:
// threads of a block for one voxel.
template <class Real>
__global__ void __launch_bounds__(threads)
    last_delta_kernel(const Real* delta, int n_out, const Real* weight, const Real* z, int n, Hidden<Real> activation,
                      int voxels, int across, Real* out) {
  const int at_once = threads / across;
  for (int v = blockIdx.x * at_once + threadIdx.x / across; v < voxels; v += gridDim.x * at_once)
    for (int c = threadIdx.x % across; c < n; c += across) {
      const int64_t e = static_cast<int64_t>(v) * n + c;
      Real sum = 0;
      for (int o = 0; o < n_out; ++o) sum += delta[static_cast<int64_t>(v) * n_out + o] * weight[o * n + c];
      out[e] = sum * slope_at(activation, z[e]);
    }
}

}  // namespace tcam
