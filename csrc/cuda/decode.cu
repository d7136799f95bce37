// The ops on CUDA. Points, and grids that do not separate, go through points.cuh, other grids through planes.cuh: with the
// tensor-core kernels (fused_points.cuh, fused.cuh) where these serve the problem and the device, else layer by layer, for
// every shape (points.cuh, layers.cuh).
#include "fused.cuh"
#include "fused_points.cuh"
#include "launch.h"
#include "layers.cuh"
#include "points.cuh"

namespace tcam {
namespace {

// f(kernels, why), with the kernels that a problem takes on a device, and why these are not the fused ones.
template <class F>
int with_kernels(const tcam_problem& problem, Output output, const Device& device, void* workspace, cudaStream_t stream, F f) {
  const bool backward = output == Output::gradients, wide = problem.dtype == TCAM_F64;
  if (walks_points(problem)) {
    Refusal why = fused_refusal(problem);
    if (!wide) {
      FusedPoints fused(problem, backward, workspace, stream);
      why = fused.refuses(output, device);
      if (!why.why) return f(fused, why);
      PointLayers<float> kernels(problem, backward, workspace, stream);
      return f(kernels, why);
    }
    PointLayers<double> kernels(problem, backward, workspace, stream);
    return f(kernels, why);
  }
  if (wide) {
    Layers<double> kernels(problem, backward, workspace, stream);
    return f(kernels, fused_refusal(problem));
  }
  Fused fused(problem, backward, workspace, stream);
  const Refusal why = fused.refuses(output, device);
  if (!why.why) return f(fused, why);
  Layers<float> kernels(problem, backward, workspace, stream);
  return f(kernels, why);
}

// The same on the device `id`, made current for the call.
template <class F>
int on_device(const tcam_problem& problem, Output output, void* workspace, int id, void* stream, F f) {
  DeviceGuard guard(id);
  Device device = {0, 0};
  cudaError_t status = guard.status();
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&device.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, id);
  if (status != cudaSuccess) return status;
  return with_kernels(problem, output, device, workspace, static_cast<cudaStream_t>(stream),
                      [&](auto& kernels, const Refusal&) { return f(kernels); });
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
  return tcam::on_device(*problem, tcam::Output::volume, workspace, device, stream,
                         [&](auto& kernels) { return kernels.forward(*inputs, out, nullptr, nullptr); });
}

extern "C" int tcam_decode_backward_cuda(const tcam_problem* problem, const void* grad_out, const tcam_inputs* inputs,
                                         const tcam_gradients* gradients, void* workspace, int device, void* stream) {
  return tcam::on_device(*problem, tcam::Output::gradients, workspace, device, stream,
                         [&](auto& kernels) { return kernels.backward(*inputs, grad_out, nullptr, nullptr, *gradients); });
}

extern "C" int tcam_decode_loss_cuda(const tcam_problem* problem, const tcam_objective* objective, const tcam_inputs* inputs,
                                     double* losses, const tcam_gradients* gradients, void* workspace, int device,
                                     void* stream) {
  const bool backward = tcam::loss_wants_gradients(*problem);
  return tcam::on_device(*problem, backward ? tcam::Output::gradients : tcam::Output::losses, workspace, device, stream,
                         [&](auto& kernels) {
                           if (!backward)
                             return kernels.forward(*inputs, const_cast<void*>(objective->target), objective, losses);
                           return kernels.backward(*inputs, objective->target, objective, losses, *gradients);
                         });
}

extern "C" void tcam_decode_cuda_explain(const tcam_problem* problem, int output, int shared_limit, char* text, int size) {
  using namespace tcam;
  const Output wanted = static_cast<Output>(output);
  with_kernels(*problem, wanted, {shared_limit, 1}, nullptr, nullptr, [&](auto& kernels, const Refusal& why) {
    kernels.describe(wanted, text, static_cast<size_t>(size));
    if (!why.why) return 0;
    const size_t used = strlen(text);
    char reason[200];
    snprintf(reason, sizeof reason, why.why, why.got, why.most);
    snprintf(text + used, static_cast<size_t>(size) - used, "; not the fused kernels: %s", reason);
    return 0;
  });
}
