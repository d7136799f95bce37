// The activations and their slopes, shared by host and device. `M` supplies the arithmetic of a value type V (a CPU vector or a
// scalar on a device): exp, tanh, log1p, sin, cos, normal_cdf, select, splat.
#pragma once

#if defined(__CUDACC__)
#define TCAM_MATHS static __host__ __device__ __forceinline__
#else
#define TCAM_MATHS static inline __attribute__((always_inline))
#endif

namespace tcam {

// The names of the activations in C++ and, through the bindings, in Python. activations.py has their formulas and parameters p.
#define TCAM_HIDDEN_ACTIVATIONS(X) X(relu) X(leaky_relu) X(silu) X(softplus) X(tanh) X(gelu) X(sine) X(half_sine)
#define TCAM_OUTPUT_ACTIVATIONS(X) X(none) X(sigmoid) X(clamp) X(affine_sigmoid) X(softplus) X(trunc_exp) X(tanh) X(half_sine)

#define TCAM_ENUM(name) name,
enum class Activation : int { TCAM_HIDDEN_ACTIVATIONS(TCAM_ENUM) };
enum class OutputActivation : int { TCAM_OUTPUT_ACTIVATIONS(TCAM_ENUM) };
#undef TCAM_ENUM

// An activation with its parameter, as the kernels take it. Real is the type that they compute in.
template <class Real>
struct Hidden {
  Activation kind;
  Real p;
};
template <class Real>
struct Final {
  OutputActivation kind;
  Real p;
};

constexpr double softplus_threshold = 20;  // torch.nn.functional.softplus's default
constexpr double trunc_exp_most = 15;      // the gradient of trunc_exp is constant above it

// Whether the slope follows from the value: relu and leaky_relu keep the sign of their argument.
TCAM_MATHS constexpr bool slope_from_value(Activation a) { return a == Activation::relu || a == Activation::leaky_relu; }

template <class M>
struct Maths {
  using V = typename M::V;

  TCAM_MATHS V sigmoid(V z) { return M::splat(1) / (M::splat(1) + M::exp(-z)); }

  // The slope of the sigmoid as e/(1 + e)^2 with e = exp(-|z|), which does not cancel where the sigmoid is close to 1.
  TCAM_MATHS V logistic_slope(V z) {
    const V e = M::exp(M::select(z < M::splat(0), z, -z)), d = M::splat(1) + e;
    return e / (d * d);
  }

  // log(1 + exp(z)), and z above torch's threshold.
  TCAM_MATHS V softplus(V z) {
    const V e = M::exp(M::select(z < M::splat(0), z, -z));  // max(z, 0) + log(1 + exp(-|z|))
    const V soft = M::select(z < M::splat(0), M::splat(0), z) + M::log1p(e);
    return M::select(z > M::splat(softplus_threshold), z, soft);
  }
  TCAM_MATHS V softplus_slope(V z) { return M::select(z > M::splat(softplus_threshold), M::splat(1), sigmoid(z)); }

  // a(z). NaN gives NaN.
  template <class Real>
  TCAM_MATHS V value(Hidden<Real> a, V z) {
    switch (a.kind) {
      case Activation::relu: return M::select(z < M::splat(0), M::splat(0), z);
      case Activation::leaky_relu: return M::select(z < M::splat(0), z * M::splat(a.p), z);
      case Activation::silu: return z * sigmoid(z);
      case Activation::softplus: return softplus(z * M::splat(a.p)) * M::splat(1 / a.p);
      case Activation::tanh: return M::tanh(z);
      case Activation::gelu: return z * M::normal_cdf(z);
      case Activation::sine: return M::sin(z * M::splat(a.p));
      case Activation::half_sine: return (M::sin(z * M::splat(a.p)) + M::splat(1)) * M::splat(0.5);
    }
    return z;
  }

  // a'(z) of the smooth activations.
  template <class Real>
  TCAM_MATHS V slope(Hidden<Real> a, V z, V value) {
    switch (a.kind) {
      case Activation::silu: {
        const V s = sigmoid(z);
        return s + value * (M::splat(1) - s);
      }
      case Activation::softplus: return softplus_slope(z * M::splat(a.p));
      case Activation::tanh: return M::splat(1) - value * value;
      case Activation::gelu: {
        const V density = M::exp(z * z * M::splat(-0.5)) * M::splat(0.3989422804014327);  // 1/sqrt(2 pi)
        return M::normal_cdf(z) + z * density;
      }
      case Activation::sine: return M::cos(z * M::splat(a.p)) * M::splat(a.p);
      case Activation::half_sine: return M::cos(z * M::splat(a.p)) * M::splat(a.p / 2);
      default: return M::splat(1);
    }
  }

  // a'(z) of relu and leaky_relu from a(z). At 0 it is that of negative z, as in torch.
  template <class Real>
  TCAM_MATHS V slope_of_value(Hidden<Real> a, V value) {
    const V below = a.kind == Activation::relu ? M::splat(0) : M::splat(a.p);
    return M::select(value > M::splat(0), M::splat(1), below);
  }

  template <class Real>
  TCAM_MATHS V output(Final<Real> a, V z) {
    switch (a.kind) {
      case OutputActivation::sigmoid: return sigmoid(z);
      case OutputActivation::clamp: return M::select(z < M::splat(0), M::splat(0), M::select(z > M::splat(1), M::splat(1), z));
      case OutputActivation::affine_sigmoid: return sigmoid(z) * M::splat(1 + 2 * a.p) - M::splat(a.p);
      case OutputActivation::softplus: return softplus(z + M::splat(a.p));
      case OutputActivation::trunc_exp: return M::exp(z + M::splat(a.p));
      case OutputActivation::tanh: return M::tanh(z);
      case OutputActivation::half_sine: return (M::sin(z * M::splat(a.p)) + M::splat(1)) * M::splat(0.5);
      default: return z;
    }
  }

  // The slope of the output activation. clamp has slope 1 on [0, 1], ends included, as in torch.clamp.
  template <class Real>
  TCAM_MATHS V output_slope(Final<Real> a, V z) {
    switch (a.kind) {
      case OutputActivation::sigmoid:
      case OutputActivation::affine_sigmoid: {
        const V slope = logistic_slope(z);
        return a.kind == OutputActivation::sigmoid ? slope : slope * M::splat(1 + 2 * a.p);
      }
      case OutputActivation::clamp:
        return M::select(z < M::splat(0), M::splat(0), M::select(z > M::splat(1), M::splat(0), M::splat(1)));
      case OutputActivation::softplus: return softplus_slope(z + M::splat(a.p));
      case OutputActivation::trunc_exp: {
        const V x = z + M::splat(a.p);
        return M::exp(M::select(x > M::splat(trunc_exp_most), M::splat(trunc_exp_most), x));
      }
      case OutputActivation::half_sine: return M::cos(z * M::splat(a.p)) * M::splat(a.p / 2);
      case OutputActivation::tanh: return logistic_slope(z + z) * M::splat(4);  // tanh z = 2 sigmoid(2z) - 1
      default: return M::splat(1);
    }
  }
};

}  // namespace tcam
