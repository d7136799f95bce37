// The ops on CUDA. A Decode has a first layer (Grid or Points) and an MLP (Mlp for every shape; FusedMlp or FusedRows on tensor
// cores). It lays out their workspace and runs the loop over rounds and regions.
#include <stdlib.h>

#include "../formulation.h"
#include "fused_rows.cuh"
#include "grid.cuh"
#include "launch.h"
#include "mlp.cuh"
#include "points.cuh"

#if !defined(TCAM_CUDA_ARCHITECTURES)  // setup.py defines it; the emulator runs everything
#define TCAM_CUDA_ARCHITECTURES "sm_90a"
#endif

namespace tcam {
namespace {

// A round is one object of a grid, or all points at once. For each round, forward and backward call on every region in turn:
//   First::forward   writes z_1, the first layer before its activation, to mlp_.input();
//   Mlp::forward     continues from there to the output or the losses;
//   Mlp::backward    recomputes that and writes delta_1, the gradient of z_1, to mlp_.delta();
//   First::backward  adds delta_1 to the sums from which First::end computes the gradients of the planes.
// Partial sums of the decoder's gradients stay in the workspace until write_gradients adds them up.
template <class First, class Mlp>
class Decode {
  using Real = typename First::Real;

 public:
  // With a null workspace the decode only measures: bytes() and refuses() are valid.
  Decode(const tcam_problem& problem, bool backward, void* workspace, cudaStream_t stream)
      : p(problem), c(problem, backward, stream), first_(c), mlp_(c), refusal_(mlp_.refuses(first_.box())) {
    if (refusal_.why) return;
    Carver ws(workspace);
    regions_ = mlp_.regions(first_);
    first_.template carve<typename Mlp::Input>(ws, regions_);
    mlp_.carve(ws, regions_);
    const int64_t begin = ws.used();
    if (backward && p.grad_decoder) {
      first_.carve_partials(ws);
      mlp_.carve_partials(ws);
    }
    bytes_ = ws.used();
    partials_ = static_cast<char*>(workspace) + begin;
    partials_bytes_ = bytes_ - begin;
  }

  Decode(const Decode&) = delete;  // its parts hold references to each other

  int64_t bytes() const { return bytes_; }  // size of the workspace
  Refusal refuses(Output output, const Device& device) { return refusal_.why ? refusal_ : mlp_.refuses(output, device); }
  void describe(Output output, char* text, size_t size) const { mlp_.describe(output, text, size); }

  // Without an objective (null), writes the output to `out`. With one, `out` is the target and is only read; losses[b] becomes
  // the sum of object b's losses.
  cudaError_t forward(const tcam_inputs& in, void* out, const tcam_objective* objective, double* losses) {
    begin(in, nullptr, objective, losses);
    for (int64_t round = 0; round < first_.rounds() && !c.status(); ++round) {
      const Volume volume = volume_of(out, objective, round);
      first_.begin(in, round, volume);
      regions_.each([&](const Region& region) {
        first_.forward(region, mlp_.input());
        if (p.layers) mlp_.forward(region, volume, objective, losses + round);
      });
    }
    return c.status();
  }

  // Writes the gradients that the problem asks for to `to`. `out` is the gradient of the output; with an objective it is the
  // target, and the losses are written as in forward.
  cudaError_t backward(const tcam_inputs& in, const void* out, const tcam_objective* objective, double* losses,
                       const tcam_gradients& to) {
    const bool per_object = objective && objective->per_object;
    begin(in, out, objective, losses);
    for (int64_t round = 0; round < first_.rounds() && !c.status(); ++round) {
      const Volume volume = volume_of(const_cast<void*>(out), objective, round);
      if (round == 0 || per_object) c.clear(partials_, partials_bytes_);
      first_.begin(in, round, volume);
      first_.begin_gradients();
      regions_.each([&](const Region& region) {
        first_.forward(region, mlp_.input());
        if (p.layers) mlp_.backward(region, volume, objective, losses + round);
        first_.backward(region, mlp_.delta(), to);
      });
      first_.end(in, round, to);
      if (!p.grad_decoder || !(per_object || round == first_.rounds() - 1)) continue;
      c.set_gradients(to, per_object ? round : 0);
      first_.write_gradients();
      mlp_.write_gradients();
    }
    return c.status();
  }

 private:
  const tcam_problem& p;
  Context<Real> c;
  First first_;
  Mlp mlp_;
  const Refusal refusal_;  // why the MLP does not take the problem's shape
  Regions regions_ = {};
  char* partials_ = nullptr;  // partial sums of the decoder's gradients: the last partials_bytes_ of the workspace
  int64_t bytes_ = 0, partials_bytes_ = 0;

  // `out`: the gradient of the output or the target, which FusedMlp reads to choose float16's scales; null in forward.
  void begin(const tcam_inputs& in, const void* out, const tcam_objective* objective, double* losses) {
    const int64_t* n = first_.box();
    c.set_layers(in);
    if (objective) c.clear(losses, p.batch * sizeof(double));
    mlp_.begin(out, objective, first_.rounds() * n[0] * n[1] * n[2]);
  }
  // The output array of a round: (C_out, box) of one object of a grid, or (points, C_out).
  Volume volume_of(void* out, const tcam_objective* objective, int64_t round) const {
    const int dtype = objective ? objective->target_dtype : p.out_dtype;
    const int64_t *n = first_.box(), voxels = n[0] * n[1] * n[2], n_out = p.width[p.layers];
    if (p.points >= 0) return {out, dtype, 1, n_out};
    return {static_cast<char*>(out) + round * n_out * voxels * dtype_bytes(dtype), dtype, voxels, 1};
  }
};

// Calls f(decode) for each kind of decode that suits the problem, the fastest first, until f returns true.
template <class F>
void for_each_decode(const tcam_problem& problem, bool backward, void* workspace, cudaStream_t stream, F f) {
  auto offer = [&](auto decode) { return f(decode); };
  if (walks_points(problem)) {
    if (problem.dtype == TCAM_F64)
      offer(Decode<Points<double>, Mlp<double>>(problem, backward, workspace, stream));
    else
      offer(Decode<Points<float>, FusedRows>(problem, backward, workspace, stream)) ||
          offer(Decode<Points<float>, Mlp<float>>(problem, backward, workspace, stream));
  } else {
    if (problem.dtype == TCAM_F64)
      offer(Decode<Grid<double>, Mlp<double>>(problem, backward, workspace, stream));
    else
      offer(Decode<Grid<float>, FusedMlp>(problem, backward, workspace, stream)) ||
          offer(Decode<Grid<float>, Mlp<float>>(problem, backward, workspace, stream));
  }
}

// Calls f(decode, why) with the first decode that takes the problem on `device`; `why` says why that is not a fused one.
template <class F>
void with_decode(const tcam_problem& problem, Output output, const Device& device, void* workspace, cudaStream_t stream, F f) {
  Refusal why = fused_refusal(problem);
  for_each_decode(problem, output == Output::gradients, workspace, stream, [&](auto& decode) {
    const Refusal refusal = decode.refuses(output, device);
    if (refusal.why)
      why = refusal;
    else
      f(decode, why);
    return !refusal.why;
  });
}

// Whether kernels with wgmma run on a device of a compute capability. The environment variable TCAM_WARPGROUPS=0 turns them
// off.
bool has_warpgroups(int major, int minor) {
  const bool built = strstr(TCAM_CUDA_ARCHITECTURES, "sm_90a") != nullptr;
  const char* wanted = getenv("TCAM_WARPGROUPS");
  return built && major == 9 && minor == 0 && !(wanted && strcmp(wanted, "0") == 0);
}

cudaError_t get_device(int id, Device* device) {
  int major = 0, minor = 0;
  cudaError_t status = cudaDeviceGetAttribute(&device->shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&device->processors, cudaDevAttrMultiProcessorCount, id);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id);
  device->warpgroups = has_warpgroups(major, minor);
  return status;
}

// Calls f(decode) with device `id` current, for the call alone. Returns the first CUDA error or what f returns.
template <class F>
int on_device(const tcam_problem& problem, Output output, void* workspace, int id, void* stream, F f) {
  DeviceGuard guard(id);
  Device device = {};
  cudaError_t status = guard.status();
  if (status == cudaSuccess) status = get_device(id, &device);
  if (status != cudaSuccess) return status;
  with_decode(problem, output, device, workspace, static_cast<cudaStream_t>(stream),
              [&](auto& decode, const Refusal&) { status = f(decode); });
  return status;
}

}  // namespace
}  // namespace tcam

extern "C" int64_t tcam_decode_cuda_workspace(const tcam_problem* problem, int backward) {
  int64_t most = 0;  // enough for every kind of decode: the device, and so the kind, is not known here
  tcam::for_each_decode(*problem, backward != 0, nullptr, nullptr, [&](auto& decode) {
    most = decode.bytes() > most ? decode.bytes() : most;
    return false;
  });
  return most;
}

extern "C" int tcam_decode_cuda(const tcam_problem* problem, const tcam_inputs* inputs, void* out, void* workspace, int device,
                                void* stream) {
  return tcam::on_device(*problem, tcam::Output::volume, workspace, device, stream,
                         [&](auto& decode) { return decode.forward(*inputs, out, nullptr, nullptr); });
}

extern "C" int tcam_decode_backward_cuda(const tcam_problem* problem, const void* grad_out, const tcam_inputs* inputs,
                                         const tcam_gradients* gradients, void* workspace, int device, void* stream) {
  return tcam::on_device(*problem, tcam::Output::gradients, workspace, device, stream,
                         [&](auto& decode) { return decode.backward(*inputs, grad_out, nullptr, nullptr, *gradients); });
}

extern "C" int tcam_decode_loss_cuda(const tcam_problem* problem, const tcam_objective* objective, const tcam_inputs* inputs,
                                     double* losses, const tcam_gradients* gradients, void* workspace, int device,
                                     void* stream) {
  const bool backward = tcam::loss_wants_gradients(*problem);
  return tcam::on_device(*problem, backward ? tcam::Output::gradients : tcam::Output::losses, workspace, device, stream,
                         [&](auto& decode) {
                           if (!backward)
                             return decode.forward(*inputs, const_cast<void*>(objective->target), objective, losses);
                           return decode.backward(*inputs, objective->target, objective, losses, *gradients);
                         });
}

extern "C" void tcam_decode_cuda_explain(const tcam_problem* problem, int output, int shared_limit, int warpgroups, char* text,
                                         int size) {
  using namespace tcam;
  const Output wanted = static_cast<Output>(output);
  with_decode(*problem, wanted, {shared_limit, 1, warpgroups != 0}, nullptr, nullptr, [&](auto& decode, const Refusal& why) {
    decode.describe(wanted, text, static_cast<size_t>(size));
    if (!why.why) return;
    const size_t used = strlen(text);
    char reason[200];
    snprintf(reason, sizeof reason, why.why, why.got, why.most);
    snprintf(text + used, static_cast<size_t>(size) - used, "; not the fused kernels: %s", reason);
  });
}

extern "C" int tcam_cuda_device(int device, int* shared_limit, int* warpgroups) {
  tcam::Device of = {};
  const cudaError_t status = tcam::get_device(device, &of);
  *shared_limit = of.shared_limit;
  *warpgroups = of.warpgroups;
  return status;
}
