// The ops on the CPU. A Decode has a first layer, Grid (grid.h), ProductGrid (grid_product.h) or Points (points.h), and an MLP
// (mlp.h). It runs the loop over rounds, pieces and blocks.
#include "decode.h"

#include <chrono>

#include "grid.h"
#include "grid_product.h"
#include "points.h"

namespace tcam {
namespace {

// A round is one object of a grid, or all points at once. A piece is a part of a round that is processed at a time (a slab of a
// grid, a wave of points), and is cut into blocks that threads take. In each block, First::forward_block prepares what
// First::maps points to, the MLP runs the voxel loop over it, and First::backward_block continues from the gradient of what the
// maps hold: z_1, or the features.
template <class First>
class Decode {
  using Real = typename First::Real;

 public:
  Decode(const tcam_problem& problem, bool backward, Carver& ws)
      : p(problem), mlp_(problem, backward, First::blocks(problem, backward), ws), first_(mlp_, ws) {}
  Decode(const Decode&) = delete;  // its parts hold references to each other

  // Without an objective (null), writes the output to `out`. With one, `out` is the target and is only read; losses[b] becomes
  // the sum of object b's losses.
  void forward(const tcam_inputs& in, void* out, const tcam_objective* objective, double* losses) {
    begin(in);
    for (long round = 0; round < first_.rounds(); ++round) {
      first_.begin(in, round);
      mlp_.clear_losses();
      first_.each_piece([&](const auto& piece) {
        const Volume volume = volume_of(out, objective, round, piece);
        const Maps maps = first_.maps(piece);
        each_block(piece, [&](const Block& block, long task, int thread) {
          first_.forward_block(piece, volume, task, thread);
          if (p.layers) mlp_.forward_block(maps, block, volume, objective, task, thread);
        });
      });
      if (objective) losses[round] = mlp_.total_loss();
    }
  }

  // Writes the gradients that the problem asks for to `to`. `out` is the gradient of the output; with an objective it is the
  // target, and the losses are written as in forward.
  void backward(const tcam_inputs& in, const void* out, const tcam_objective* objective, double* losses,
                const tcam_gradients& to) {
    const bool per_object = objective && objective->per_object;
    begin(in);
    for (long round = 0; round < first_.rounds(); ++round) {
      if (round == 0 || per_object) {
        mlp_.clear_gradients();
        first_.clear_gradients();
      }
      first_.begin(in, round);
      mlp_.clear_losses();
      first_.begin_gradients(to);
      first_.each_piece([&](const auto& piece) {
        const Volume volume = volume_of(const_cast<void*>(out), objective, round, piece);
        const Maps maps = first_.maps(piece);
        first_.begin_backward(piece);
        each_block(piece, [&](const Block& block, long task, int thread) {
          first_.forward_block(piece, volume, task, thread);
          if (p.layers) mlp_.backward_block(maps, block, volume, objective, first_.gradients(piece, task), task, thread);
          first_.backward_block(piece, volume, task, thread, to);
        });
        first_.end_backward(piece);
      });
      if (objective) losses[round] = mlp_.total_loss();
      first_.end(in, round, to);
      if (!p.layers || !p.grad_decoder || !(per_object || round == first_.rounds() - 1)) continue;
      first_.write_gradients(to, per_object ? round : 0);
      mlp_.write_gradients(to, per_object ? round : 0);
    }
  }

 private:
  const tcam_problem& p;
  Mlp<Real> mlp_;
  First first_;

  void begin(const tcam_inputs& in) {
    mlp_.pack(in);
    first_.pack(in);
  }
  template <class Piece, class F>
  void each_block(const Piece& piece, F f) {
    parallel_for(mlp_.blocks, mlp_.threads, [&](long task, int thread) {
      const Block block = first_.block(piece, task);
      if (block.j0 < block.j1) f(block, task, thread);
    });
  }
  // The output array of a round, (C_out, box) of one object of a grid or (points, C_out), with the piece's first voxel as
  // offset.
  template <class Piece>
  Volume volume_of(void* out, const tcam_objective* objective, long round, const Piece& piece) const {
    const int dtype = objective ? objective->target_dtype : p.out_dtype;
    const long n_out = static_cast<long>(p.width[p.layers]), first = first_.first_voxel(piece);
    if (p.points >= 0) return {out, dtype, 1, n_out, first};
    const long voxels = static_cast<long>((p.hi[0] - p.lo[0]) * (p.hi[1] - p.lo[1]) * (p.hi[2] - p.lo[2]));
    return {static_cast<char*>(out) + round * n_out * voxels * dtype_bytes(dtype), dtype, voxels, 1, first};
  }
};

// Calls f(decode, carver) with the problem's Decode in `workspace`; a null workspace is only measured.
template <class F>
auto with_decode(const tcam_problem& problem, bool backward, void* workspace, F f) {
  Carver ws(workspace);
  auto run = [&](auto real) {
    using Real = decltype(real);
    if (multiplies_maps(problem)) {
      Decode<ProductGrid<Real>> decode(problem, backward, ws);
      return f(decode, ws);
    }
    if (walks_points(problem)) {
      Decode<Points<Real>> decode(problem, backward, ws);
      return f(decode, ws);
    }
    Decode<Grid<Real>> decode(problem, backward, ws);
    return f(decode, ws);
  };
  return problem.dtype == TCAM_F64 ? run(double()) : run(float());
}

// Linear interpolation along the middle axis, in (outer, texels, inner) to out (outer, n, inner), or with p.adjoint its
// adjoint, in (outer, n, inner) to out (outer, texels, inner). A task is one of the outer arrays; voxels are added in ascending
// order.
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
  return tcam::with_decode(*problem, backward != 0, nullptr, [](auto&, tcam::Carver& ws) { return ws.used(); });
}

void tcam_decode_cpu(const tcam_problem* problem, const tcam_inputs* inputs, void* out, void* workspace) {
  tcam::with_decode(*problem, false, workspace,
                    [&](auto& decode, tcam::Carver&) { decode.forward(*inputs, out, nullptr, nullptr); });
}

void tcam_decode_backward_cpu(const tcam_problem* problem, const void* grad_out, const tcam_inputs* inputs,
                              const tcam_gradients* gradients, void* workspace) {
  tcam::with_decode(*problem, true, workspace,
                    [&](auto& decode, tcam::Carver&) { decode.backward(*inputs, grad_out, nullptr, nullptr, *gradients); });
}

void tcam_decode_loss_cpu(const tcam_problem* problem, const tcam_objective* objective, const tcam_inputs* inputs,
                          double* losses, const tcam_gradients* gradients, void* workspace) {
  const bool backward = tcam::loss_wants_gradients(*problem);
  tcam::with_decode(*problem, backward, workspace, [&](auto& decode, tcam::Carver&) {
    if (backward)
      decode.backward(*inputs, objective->target, objective, losses, *gradients);
    else
      decode.forward(*inputs, const_cast<void*>(objective->target), objective, losses);
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
    const tcam::NoiseKey key = {n->seed, 0, static_cast<uint32_t>(task / pieces), static_cast<uint32_t>(n->sequence)};
    const tcam::Range b = tcam::chunk(blocks, pieces, task % pieces);
    engine.normals(key, static_cast<long>(n->count), b.lo, b.hi, out + task / pieces * n->count);
  });
}

void tcam_philox_cpu(uint32_t counter[4], uint32_t k0, uint32_t k1) { tcam::pick_engine(0).philox(counter, k0, k1); }

const char* tcam_cpu_isa(void) { return tcam::instruction_set().name; }
int tcam_cpu_bf16_is_fast(void) { return tcam::bf16_is_fast(); }
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
