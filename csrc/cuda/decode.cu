// The ops on CUDA. Points, and grids that do not separate, take a road of points.h, other grids one of planes.h: with the
// tensor-core kernels (fused_points.h, fused.h) where these serve the problem and the device, else layer by layer, for every
// shape (points.h, layers.h).
#include "fused.h"
#include "fused_points.h"
#include "launch.h"
#include "layers.h"
#include "points.h"

namespace tcam {
namespace {

template <class F>
int with_road(const tcam_problem& problem, Output output, void* workspace, int device, void* stream, F f) {
  DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const bool backward = output == Output::gradients;
  if (walks_points(problem)) {
    if (problem.dtype == TCAM_F64) {
      PointLayers<double> road(problem, backward, workspace, s);
      return f(road);
    }
    FusedPoints fused(problem, backward, workspace, s);
    if (fused.serves(output)) return f(fused);
    PointLayers<float> road(problem, backward, workspace, s);
    return f(road);
  }
  if (problem.dtype == TCAM_F64) {
    Layers<double> road(problem, backward, workspace, s);
    return f(road);
  }
  Fused fused(problem, backward, workspace, s);
  if (fused.serves(output)) return f(fused);
  Layers<float> road(problem, backward, workspace, s);
  return f(road);
}

}  // namespace
}  // namespace tcam

extern "C" int64_t tcam_decode_cuda_workspace(const tcam_problem* problem, int backward) {
  if (tcam::walks_points(*problem)) {
    if (problem->dtype == TCAM_F64) return tcam::PointLayers<double>(*problem, backward != 0, nullptr, nullptr).bytes();
    const int64_t general = tcam::PointLayers<float>(*problem, backward != 0, nullptr, nullptr).bytes();
    const int64_t fused = tcam::FusedPoints(*problem, backward != 0, nullptr, nullptr).bytes();
    return fused > general ? fused : general;
  }
  if (problem->dtype == TCAM_F64) return tcam::Layers<double>(*problem, backward != 0, nullptr, nullptr).bytes();
  const int64_t general = tcam::Layers<float>(*problem, backward != 0, nullptr, nullptr).bytes();
  const int64_t fused = tcam::Fused(*problem, backward != 0, nullptr, nullptr).bytes();
  return fused > general ? fused : general;
}

extern "C" int tcam_decode_cuda(const tcam_problem* problem, const tcam_inputs* inputs, void* out, void* workspace, int device,
                                void* stream) {
  return tcam::with_road(*problem, tcam::Output::volume, workspace, device, stream,
                         [&](auto& road) { return road.forward(*inputs, out, nullptr, nullptr); });
}

extern "C" int tcam_decode_backward_cuda(const tcam_problem* problem, const void* grad_out, const tcam_inputs* inputs,
                                         const tcam_gradients* gradients, void* workspace, int device, void* stream) {
  return tcam::with_road(*problem, tcam::Output::gradients, workspace, device, stream,
                         [&](auto& road) { return road.backward(*inputs, grad_out, nullptr, nullptr, *gradients); });
}

extern "C" int tcam_decode_loss_cuda(const tcam_problem* problem, const tcam_objective* objective, const tcam_inputs* inputs,
                                     double* losses, const tcam_gradients* gradients, void* workspace, int device,
                                     void* stream) {
  const bool backward = tcam::loss_wants_gradients(*problem);
  return tcam::with_road(*problem, backward ? tcam::Output::gradients : tcam::Output::losses, workspace, device, stream,
                         [&](auto& road) {
                           if (!backward) return road.forward(*inputs, const_cast<void*>(objective->target), objective, losses);
                           return road.backward(*inputs, objective->target, objective, losses, *gradients);
                         });
}
