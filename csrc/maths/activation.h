// The activations, written once. `M` supplies the arithmetic of a value type V (a CPU
// vector, a scalar on a device): exp, tanh, log1p, select, splat.
#pragma once

#if defined(__CUDACC__)
#define TCAM_MATHS static __host__ __device__ __forceinline__
#else
#define TCAM_MATHS static inline __attribute__((always_inline))
#endif

namespace tcam {

// One list names them for C++ and, through the bindings, for Python (activations.py).
#define TCAM_HIDDEN_ACTIVATIONS(X) X(relu) X(leaky_relu) X(silu) X(softplus) X(tanh)
#define TCAM_OUTPUT_ACTIVATIONS(X) X(none) X(sigmoid) X(clamp)

#define TCAM_ENUM(name) name,
enum class Activation : int { TCAM_HIDDEN_ACTIVATIONS(TCAM_ENUM) };
enum class OutputActivation : int { TCAM_OUTPUT_ACTIVATIONS(TCAM_ENUM) };
#undef TCAM_ENUM

constexpr double leaky_slope = 0.01;       // torch.nn.functional.leaky_relu's default
constexpr double softplus_threshold = 20;  // torch.nn.functional.softplus's default

// relu and leaky_relu keep the sign of their argument: the slope follows from the value.
TCAM_MATHS constexpr bool slope_from_value(Activation a) { return a == Activation::relu || a == Activation::leaky_relu; }

template <class M>
struct Maths {
  using V = typename M::V;

  TCAM_MATHS V sigmoid(V z) { return M::splat(1) / (M::splat(1) + M::exp(-z)); }

  // a(z). A NaN argument gives NaN.
  TCAM_MATHS V value(Activation a, V z) {
    switch (a) {
      case Activation::relu: return M::select(z < M::splat(0), M::splat(0), z);
      case Activation::leaky_relu: return M::select(z < M::splat(0), z * M::splat(leaky_slope), z);
      case Activation::silu: return z * sigmoid(z);
      case Activation::softplus: {
        // max(z, 0) + log(1 + exp(-|z|)); torch returns z itself above its threshold.
        const V e = M::exp(M::select(z < M::splat(0), z, -z));
        const V soft = M::select(z < M::splat(0), M::splat(0), z) + M::log1p(e);
        return M::select(z > M::splat(softplus_threshold), z, soft);
      }
      case Activation::tanh: return M::tanh(z);
    }
    return z;
  }

  // a'(z) of the smooth activations.
  TCAM_MATHS V slope(Activation a, V z, V value) {
    switch (a) {
      case Activation::silu: {
        const V s = sigmoid(z);
        return s + value * (M::splat(1) - s);
      }
      case Activation::softplus: return M::select(z > M::splat(softplus_threshold), M::splat(1), sigmoid(z));
      case Activation::tanh: return M::splat(1) - value * value;
      default: return M::splat(1);
    }
  }

  // a'(z) of relu and leaky_relu, from a(z). Zero slope (leaky: the leak) at 0, as in torch.
  TCAM_MATHS V slope_of_value(Activation a, V value) {
    const V below = a == Activation::relu ? M::splat(0) : M::splat(leaky_slope);
    return M::select(value > M::splat(0), M::splat(1), below);
  }

  TCAM_MATHS V output(OutputActivation a, V z) {
    switch (a) {
      case OutputActivation::sigmoid: return sigmoid(z);
      case OutputActivation::clamp: return M::select(z < M::splat(0), M::splat(0), M::select(z > M::splat(1), M::splat(1), z));
      default: return z;
    }
  }

  // d output / d z; clamp passes the gradient on [0, 1] inclusive, as torch.clamp does.
  TCAM_MATHS V output_slope(OutputActivation a, V z) {
    switch (a) {
      case OutputActivation::sigmoid: {
        const V s = sigmoid(z);
        return s * (M::splat(1) - s);
      }
      case OutputActivation::clamp:
        return M::select(z < M::splat(0), M::splat(0), M::select(z > M::splat(1), M::splat(0), M::splat(1)));
      default: return M::splat(1);
    }
  }
};

}  // namespace tcam
