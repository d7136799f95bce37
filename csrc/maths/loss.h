// The pointwise losses, shared by host and device. activation.h describes `M`.
#pragma once
#include "activation.h"

namespace tcam {

// The names of the losses in C++ and, through the bindings, in Python.
#define TCAM_LOSSES(X) X(smooth_l1) X(l1) X(mse)

#define TCAM_ENUM(name) name,
enum class Loss : int { TCAM_LOSSES(TCAM_ENUM) };
#undef TCAM_ENUM

template <class M>
struct LossMaths {
  using V = typename M::V;

  // l(d) for the difference d = decoded - target. smooth_l1: d^2/(2 beta) for |d| < beta, else |d| - beta/2.
  TCAM_MATHS V value(Loss loss, V d, double beta) {
    if (loss == Loss::mse) return d * d;
    const V a = M::select(d < M::splat(0), -d, d);
    if (loss == Loss::l1 || beta == 0) return a;
    return M::select(a < M::splat(beta), d * d * M::splat(0.5 / beta), a - M::splat(0.5 * beta));
  }

  // l'(d). The slope of |d| at 0 is 0, as in torch.
  TCAM_MATHS V slope(Loss loss, V d, double beta) {
    if (loss == Loss::mse) return d + d;
    const V sign = M::select(d > M::splat(0), M::splat(1), M::select(d < M::splat(0), M::splat(-1), d));
    if (loss == Loss::l1 || beta == 0) return sign;
    const V a = M::select(d < M::splat(0), -d, d);
    return M::select(a < M::splat(beta), d * M::splat(1 / beta), sign);
  }
};

}  // namespace tcam
