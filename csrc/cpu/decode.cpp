// The ops on the CPU: a grid that separates walks maps (grid.h), everything else walks points (points.h).
#include "decode.h"

#include <chrono>

#include "grid.h"
#include "points.h"

namespace tcam {
namespace {

// f(Grid or Points, workspace): what decodes the problem, in the type of its maps and sums.
template <class F>
auto with_decoder(const tcam_problem& problem, bool backward, void* workspace, F f) {
  Carver ws(workspace);
  auto run = [&](auto real) {
    using Real = decltype(real);
    if (walks_points(problem)) {
      Points<Real> decoder(problem, backward, ws);
      return f(decoder, ws);
    }
    Grid<Real> decoder(problem, backward, ws);
    return f(decoder, ws);
  };
  return problem.dtype == TCAM_F64 ? run(double()) : run(float());
}

template <class Real>
void resample(const tcam_resample& p, const double* bounds, const Real* in, Real* out) {
  const long n = p.hi - p.lo;
  std::vector<Tap<double>> taps;
  for (long i = 0; i < n; ++i)
    taps.push_back(
        voxel_tap({static_cast<int>(p.texels), p.align_corners != 0, p.padding}, p.lo + i, p.size, p.corners != 0, bounds));
  parallel_for(p.outer, p.threads, [&](long o, int) {
    const Real* from = in + o * (p.adjoint ? n : p.texels) * p.inner;
    Real* to = out + o * (p.adjoint ? p.texels : n) * p.inner;
    if (p.adjoint) std::memset(to, 0, static_cast<size_t>(p.texels * p.inner) * sizeof(Real));
    for (long i = 0; i < n; ++i) {
      const Tap<double>& t = taps[static_cast<size_t>(i)];
      const Real lo = static_cast<Real>(t.w_lo), hi = static_cast<Real>(t.w_hi);
      if (p.adjoint)
        for (long x = 0; x < p.inner; ++x) {
          to[t.lo * p.inner + x] += lo * from[i * p.inner + x];
          to[t.hi * p.inner + x] += hi * from[i * p.inner + x];
        }
      else
        for (long x = 0; x < p.inner; ++x) to[i * p.inner + x] = lo * from[t.lo * p.inner + x] + hi * from[t.hi * p.inner + x];
    }
  });
}

}  // namespace
}  // namespace tcam

extern "C" {

int64_t tcam_decode_cpu_workspace(const tcam_problem* problem, int backward) {
  return tcam::with_decoder(*problem, backward != 0, nullptr, [](auto&, tcam::Carver& ws) { return ws.used(); });
}

void tcam_decode_cpu(const tcam_problem* problem, const tcam_inputs* inputs, void* out, void* workspace) {
  tcam::with_decoder(*problem, false, workspace,
                     [&](auto& decoder, tcam::Carver&) { decoder.forward(*inputs, out, nullptr, nullptr); });
}

void tcam_decode_backward_cpu(const tcam_problem* problem, const void* grad_out, const tcam_inputs* inputs,
                              const tcam_gradients* gradients, void* workspace) {
  tcam::with_decoder(*problem, true, workspace,
                     [&](auto& decoder, tcam::Carver&) { decoder.backward(*inputs, grad_out, nullptr, nullptr, *gradients); });
}

void tcam_decode_loss_cpu(const tcam_problem* problem, const tcam_objective* objective, const tcam_inputs* inputs,
                          double* losses, const tcam_gradients* gradients, void* workspace) {
  const bool backward = tcam::loss_wants_gradients(*problem);
  tcam::with_decoder(*problem, backward, workspace, [&](auto& decoder, tcam::Carver&) {
    if (backward)
      decoder.backward(*inputs, objective->target, objective, losses, *gradients);
    else
      decoder.forward(*inputs, const_cast<void*>(objective->target), objective, losses);
  });
}

void tcam_resample_axis_cpu(const tcam_resample* problem, const double bounds[2], const void* in, void* out) {
  if (problem->dtype == TCAM_F64)
    tcam::resample(*problem, bounds, static_cast<const double*>(in), static_cast<double*>(out));
  else
    tcam::resample(*problem, bounds, static_cast<const float*>(in), static_cast<float*>(out));
}

void tcam_normals_cpu(const tcam_normals* n, float* out) {
  const long blocks = static_cast<long>(tcam::noise_blocks(n->count)), pieces = (blocks + 4095) / 4096;
  const tcam::Engine& engine = tcam::pick_engine(0);
  tcam::parallel_for(static_cast<long>(n->objects) * pieces, n->threads, [&](long task, int) {
    const tcam::NoiseKey key = {n->seed, 0, static_cast<uint32_t>(task / pieces), static_cast<uint32_t>(n->stream)};
    const tcam::Range b = tcam::chunk(blocks, pieces, task % pieces);
    engine.normals(key, static_cast<long>(n->count), b.lo, b.hi, out + task / pieces * n->count);
  });
}

void tcam_philox_cpu(uint32_t counter[4], uint32_t k0, uint32_t k1) { tcam::pick_engine(0).philox(counter, k0, k1); }

const char* tcam_cpu_isa(void) { return tcam::instruction_set().name; }
int tcam_cpu_has_bf16(void) { return tcam::instruction_set().engine(2) != nullptr; }
int tcam_cpu_forked(void) { return tcam::forked(); }

double tcam_cpu_peak_flops(int kind, double seconds, int threads) {
  const tcam::Engine* e = tcam::instruction_set().engine(kind);
  if (!e) return 0;
  using Clock = std::chrono::steady_clock;
  constexpr long iterations = 200000;
  std::vector<double> rate(static_cast<size_t>(std::max(threads, 1)), 0.0);
  tcam::parallel_for(static_cast<long>(rate.size()), threads, [&](long task, int) {
    std::vector<char> sink(4096);
    const Clock::time_point start = Clock::now();
    double flop = 0, elapsed = 0;
    do {
      flop += e->spin(iterations, sink.data());
      elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    } while (elapsed < seconds);
    rate[static_cast<size_t>(task)] = flop / elapsed;
  });
  double total = 0;
  for (double r : rate) total += r;
  return total;
}
}
