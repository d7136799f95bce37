// decode_grid on CUDA, two roads: the tensor-core kernels of fused.h where they serve the problem and the device, the general
// road of layers.h for every other shape.
#include "fused.h"
#include "launch.h"
#include "layers.h"

namespace tcam {
namespace {

template <class F>
int with_road(const tcam_decode_grid& problem, Output output, void* workspace, int device, void* stream, F f) {
  DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const bool backward = output == Output::gradients;
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

extern "C" int64_t tcam_decode_grid_cuda_workspace(const tcam_decode_grid* problem, int backward) {
  if (problem->dtype == TCAM_F64) return tcam::Layers<double>(*problem, backward != 0, nullptr, nullptr).bytes();
  const int64_t general = tcam::Layers<float>(*problem, backward != 0, nullptr, nullptr).bytes();
  const int64_t fused = tcam::Fused(*problem, backward != 0, nullptr, nullptr).bytes();
  return fused > general ? fused : general;
}

extern "C" int tcam_decode_grid_cuda(const tcam_decode_grid* problem, const void* const planes[3], const void* const* weights,
                                     const void* const* biases, void* volume, void* workspace, int device, void* stream) {
  return tcam::with_road(*problem, tcam::Output::volume, workspace, device, stream,
                         [&](auto& road) { return road.forward(planes, weights, biases, volume, nullptr, nullptr); });
}

extern "C" int tcam_decode_grid_backward_cuda(const tcam_decode_grid* problem, const void* grad_volume,
                                              const void* const planes[3], const void* const* weights,
                                              const void* const* biases, void* const grad_planes[3], void* const* grad_weights,
                                              void* const* grad_biases, void* workspace, int device, void* stream) {
  return tcam::with_road(*problem, tcam::Output::gradients, workspace, device, stream, [&](auto& road) {
    return road.backward(grad_volume, nullptr, nullptr, planes, weights, biases, grad_planes, grad_weights, grad_biases);
  });
}

extern "C" int tcam_decode_grid_loss_cuda(const tcam_decode_grid* problem, const tcam_objective* objective,
                                          const void* const planes[3], const void* const* weights, const void* const* biases,
                                          double* losses, void* const grad_planes[3], void* const* grad_weights,
                                          void* const* grad_biases, void* workspace, int device, void* stream) {
  const bool gradients = problem->grad_planes || problem->grad_decoder;
  return tcam::with_road(
      *problem, gradients ? tcam::Output::gradients : tcam::Output::losses, workspace, device, stream, [&](auto& road) {
        if (!gradients) return road.forward(planes, weights, biases, const_cast<void*>(objective->target), objective, losses);
        return road.backward(objective->target, objective, losses, planes, weights, biases, grad_planes, grad_weights,
                             grad_biases);
      });
}
