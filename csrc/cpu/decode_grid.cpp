// decode_grid on the CPU: what happens around the voxel loop, and in which order.
//
// Forward: project each plane through its block of W_1 (texels x n_1), resample the projections
// to maps A (slab, W), B (W, D), G (slab, D) one slab of i at a time, and walk the slab's voxels
// in blocks of (j, k). Backward walks the same blocks, which add their sums of the first
// layer's gradient into parts of their own; parts are combined in block order and carried back
// to texels, then through W_1 to the planes.
//
// The partition into blocks and slabs depends on the problem alone, never on the threads, and
// each sum has one order: equal inputs give equal bits.
#include "decode_grid.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <vector>

#include "../carver.h"
#include "../maths/bilinear.h"
#include "../maths/half.h"
#include "isa.h"
#include "parallel.h"

namespace tcam {
namespace {

constexpr long max_parts_bytes = 32l << 20;           // of a slab's maps and gradient parts
constexpr long texel_chunks = 16;                     // per plane in unproject: fixed, so that sums have one order
constexpr int forward_tile = 48, backward_tile = 96;  // measured: docs/performance.md

struct Range {
  long lo, hi;
};
Range chunk(long n, long chunks, long c) { return {n * c / chunks, n * (c + 1) / chunks}; }

// Everything derived from the problem: widths, strides, partition, buffers.
struct Plan {
  const tcam_decode_grid& p;
  bool backward;
  const Engine& core;  // of the hidden layers
  const Engine& real;  // of texels and maps: float32 or float64
  long n[3];           // the box, in voxels
  long texels[3], plane_rows[3], plane_columns[3];
  long c, n1, stride;  // channels a plane, width of layer 1, padded width
  long slab, j_chunks, k_chunks, blocks;
  int tile, threads;
  Decoder decoder{};
  long block_sums = 0;  // reals of decoder gradients a block

  void* project_weights[3];
  void* unproject_weights[3];
  char *projected[3], *grad_projected[3];
  char *bias_1, *a, *b, *g;
  std::vector<char*> scratch;
  char *da, *db, *dg, *sums, *rows_xy, *rows_xz, *rows_yz, *bias_1_rows, *weight_parts, *losses;
  long bytes;

  Plan(const tcam_decode_grid& problem, bool back, void* workspace)
      : p(problem),
        backward(back),
        core(*pick(problem.compute == TCAM_BF16 ? 2
                   : problem.dtype == TCAM_F64  ? 1
                                                : 0)),
        real(*pick(problem.dtype == TCAM_F64 ? 1 : 0)) {
    for (int d = 0; d < 3; ++d) n[d] = p.hi[d] - p.lo[d];
    const long h = p.planes[0], w = p.planes[1], dp = p.planes[2];
    const long rows[3] = {h, w, h}, columns[3] = {w, dp, dp};
    for (int q = 0; q < 3; ++q) plane_rows[q] = rows[q], plane_columns[q] = columns[q], texels[q] = rows[q] * columns[q];
    c = p.channels;
    n1 = p.width[1];
    stride = round_up(n1, real.columns);
    threads = std::max(1, static_cast<int>(p.threads));
    tile = p.tile > 0 ? p.tile : backward ? backward_tile : forward_tile;
    tile = static_cast<int>(std::min<long>(round_up(tile, 12), max_tile));

    const long voxels = n[0] * n[1] * n[2];
    const long wanted = std::min<long>(std::max<long>(voxels / 2048, 1), backward ? 64 : 1024);
    const long side = std::max<long>(1, std::lround(std::sqrt(static_cast<double>(wanted))));
    j_chunks = std::max<long>(1, std::min(n[1], side));
    k_chunks = std::max<long>(1, std::min(n[2], wanted / j_chunks));
    j_chunks = std::max<long>(1, std::min(n[1], wanted / k_chunks));
    blocks = j_chunks * k_chunks;
    long per_i = (n[1] + n[2]) * stride * real.real_bytes;
    if (backward) per_i += (k_chunks * n[1] + j_chunks * n[2]) * stride * real.real_bytes;
    slab = std::max<long>(1, std::min(n[0], max_parts_bytes / std::max<long>(per_i, 1)));

    decoder.layers = p.layers;
    decoder.activation = static_cast<Activation>(p.activation);
    decoder.output_activation = static_cast<OutputActivation>(p.output_activation);
    for (int l = 0; l <= p.layers; ++l) decoder.width[l] = p.width[l];
    carve(workspace);
  }

  static const Engine* pick(int kind) {
    const Engine* e = instruction_set().engine(kind);
    return e ? e : instruction_set().engine(0);  // no bfloat16 instructions: float32 products serve, and round less
  }

  long words(long reals) const { return (reals + core.pack - 1) / core.pack; }
  long map_bytes(long rows) const { return rows * stride * real.real_bytes; }

  void carve(void* workspace) {
    Carver ws(workspace);
    const int L = p.layers;
    for (int q = 0; q < 3; ++q) {
      project_weights[q] = ws.take(c * stride * real.real_bytes);
      projected[q] = ws.take(map_bytes(texels[q]));
    }
    bias_1 = ws.take(stride * real.real_bytes);
    for (int l = 2; l <= L; ++l) {
      const long in = decoder.width[l - 1], out = decoder.width[l];
      if (l < L) decoder.forward[l] = ws.take(words(in) * round_up(out, core.columns) * core.word_bytes);
      decoder.bias[l] = ws.take(round_up(out, core.columns) * core.real_bytes);
      if (backward) decoder.transposed[l] = ws.take(words(out) * round_up(in, core.columns) * core.word_bytes);
    }
    if (L > 1) decoder.last = ws.take(p.width[L] * last_stride() * core.word_bytes);
    a = ws.take(map_bytes(slab * n[1]));
    b = ws.take(map_bytes(n[1] * n[2]));
    g = ws.take(map_bytes(slab * n[2]));
    losses = ws.take(blocks * static_cast<long>(sizeof(double)));
    const long each = std::max(core.scratch_bytes(decoder, backward), real.scratch_bytes(decoder, backward));
    for (int t = 0; t < threads; ++t) scratch.push_back(ws.take(each));
    if (backward) {
      for (int q = 0; q < 3; ++q) {
        unproject_weights[q] = ws.take(n1 * round_up(c, real.columns) * real.real_bytes);
        grad_projected[q] = ws.take(map_bytes(texels[q]));
      }
      da = ws.take(map_bytes(k_chunks * slab * n[1]));
      db = ws.take(map_bytes(n[1] * n[2]));
      dg = ws.take(map_bytes(j_chunks * slab * n[2]));
      for (int l = 2; l <= L; ++l) {
        decoder.grad_offset[l] = block_sums;
        block_sums += round_up(p.width[l], core.rows) * round_up(p.width[l - 1], core.columns);
        decoder.grad_bias_offset[l] = block_sums;
        block_sums += round_up(p.width[l], core.columns);
      }
      block_sums = round_up(block_sums, 16);
      sums = ws.take(p.grad_decoder ? blocks * block_sums * core.real_bytes : 0);
      rows_xy = ws.take(map_bytes(p.planes[0] * n[1]));
      rows_xz = ws.take(map_bytes(p.planes[0] * n[2]));
      rows_yz = ws.take(map_bytes(p.planes[1] * n[2]));
      bias_1_rows = ws.take(map_bytes(n[1]));
      weight_parts = ws.take(p.grad_decoder ? 3 * texel_chunks * weight_part() * real.real_bytes : 0);
    }
    bytes = ws.used();
  }

  long last_stride() const {  // words of a row of the last layer
    return round_up(words(p.width[p.layers - 1]), core.columns / 2);
  }
  long weight_part() const { return round_up(n1, real.rows) * round_up(c, real.columns); }
};

std::vector<Taps> axis_taps(const tcam_decode_grid& p, int axis) {
  std::vector<Taps> t;
  for (long i = p.lo[axis]; i < p.hi[axis]; ++i)
    t.push_back(linear_taps(i, p.size[axis], static_cast<int>(p.planes[axis]), p.align_corners, p.padding == TCAM_PAD_ZEROS));
  return t;
}

template <class Real>
class Run {
 public:
  Run(const Plan& plan, const void* const* weights, const void* const* biases) : w(plan), p(plan.p) {
    for (int d = 0; d < 3; ++d) taps[d] = axis_taps(p, d);
    const Real* w1 = static_cast<const Real*>(weights[0]);
    for (int q = 0; q < 3; ++q) {  // W_1 = [W_xy | W_yz | W_xz]
      w.real.pack_panels(w1 + q * w.c, 1, 3 * w.c, w.c, w.n1, w.project_weights[q]);
      if (w.backward) w.real.pack_panels(w1 + q * w.c, 3 * w.c, 1, w.n1, w.c, w.unproject_weights[q]);
    }
    copy_bias(w.bias_1, biases[0], w.n1, w.stride);
    for (int l = 2; l <= p.layers; ++l) {
      const long in = p.width[l - 1], out = p.width[l];
      if (l < p.layers) w.core.pack_panels(weights[l - 1], 1, in, in, out, const_cast<void*>(w.decoder.forward[l]));
      if (w.backward) w.core.pack_panels(weights[l - 1], in, 1, out, in, const_cast<void*>(w.decoder.transposed[l]));
      copy_bias(const_cast<void*>(w.decoder.bias[l]), biases[l - 1], out, round_up(out, w.core.columns));
    }
    if (p.layers > 1)
      w.core.pack_rows(weights[p.layers - 1], p.width[p.layers], p.width[p.layers - 1], const_cast<void*>(w.decoder.last),
                       w.last_stride());
  }

  // With an objective (null: none) `volume` is its target, and losses (B) are written.
  void forward(const void* const planes[3], void* volume, const tcam_objective* objective, double* losses) {
    const int dtype = objective ? objective->target_dtype : p.out_dtype;
    for (long object = 0; object < p.batch; ++object) {
      project(object, planes);
      zero(w.losses, loss_bytes());
      for (long i0 = 0; i0 < w.n[0]; i0 += w.slab) {
        const long ni = std::min(w.slab, w.n[0] - i0);
        const Maps maps = slab_maps(i0, ni);
        const Volume v = slab_of(volume, dtype, object, i0);
        parallel_for(w.blocks, w.threads, [&](long task, int thread) {
          const Objective compare = block_objective(objective, task);
          w.core.forward(w.decoder, maps, block(task, ni), v, objective ? &compare : nullptr, w.tile, w.scratch[thread]);
        });
      }
      if (objective) losses[object] = total_loss();
    }
  }

  // `volume` is the gradient of the volume or, with an objective, its target.
  void backward(const void* volume, const tcam_objective* objective, double* losses, const void* const planes[3],
                void* const grad_planes[3], void* const* grad_weights, void* const* grad_biases) {
    const int dtype = objective ? objective->target_dtype : p.out_dtype;
    const bool per_object = objective && objective->per_object;
    for (long object = 0; object < p.batch; ++object) {
      if (object == 0 || per_object) zero_decoder_gradients();
      project(object, planes);
      zero(w.losses, loss_bytes());
      zero(w.db, w.map_bytes(w.n[1] * w.n[2]));
      zero(w.rows_xy, w.map_bytes(p.planes[0] * w.n[1]));
      zero(w.rows_xz, w.map_bytes(p.planes[0] * w.n[2]));
      for (long i0 = 0; i0 < w.n[0]; i0 += w.slab) {
        const long ni = std::min(w.slab, w.n[0] - i0);
        const Maps maps = slab_maps(i0, ni);
        zero(w.da, w.map_bytes(w.k_chunks * w.slab * w.n[1]));
        zero(w.dg, w.map_bytes(w.j_chunks * w.slab * w.n[2]));
        const Volume v = slab_of(const_cast<void*>(volume), dtype, object, i0);
        parallel_for(w.blocks, w.threads, [&](long task, int thread) {
          const long kc = task % w.k_chunks, jc = task / w.k_chunks;
          const BlockGradients grads = {w.da + w.map_bytes(kc * w.slab * w.n[1]), w.db,
                                        w.dg + w.map_bytes(jc * w.slab * w.n[2]),
                                        p.grad_decoder ? w.sums + task * w.block_sums * w.core.real_bytes : nullptr};
          const Objective compare = block_objective(objective, task);
          w.core.backward(w.decoder, maps, block(task, ni), v, objective ? &compare : nullptr, grads, w.tile,
                          w.scratch[thread]);
        });
        combine_slab(i0, ni);
      }
      if (objective) losses[object] = total_loss();
      gradients_to_texels();
      unproject(object, planes, grad_planes);
      if (p.grad_decoder && (per_object || object == p.batch - 1))
        write_decoder_gradients(grad_weights, grad_biases, per_object ? object : 0);
    }
  }

 private:
  const Plan& w;
  const tcam_decode_grid& p;
  std::vector<Taps> taps[3];

  static Real* reals(char* p) { return reinterpret_cast<Real*>(p); }
  void zero(char* p, long bytes) {
    constexpr long piece = 1l << 20;
    parallel_for((bytes + piece - 1) / piece, w.threads,
                 [&](long t, int) { std::memset(p + t * piece, 0, std::min(piece, bytes - t * piece)); });
  }
  void zero_decoder_gradients() {
    if (p.grad_decoder) {
      zero(w.sums, w.blocks * w.block_sums * w.core.real_bytes);
      zero(w.weight_parts, 3 * texel_chunks * w.weight_part() * w.real.real_bytes);
    }
    zero(w.bias_1_rows, w.map_bytes(w.n[1]));
  }
  Volume slab_of(void* base, int dtype, long object, long i0) const {
    const long voxels = w.n[0] * w.n[1] * w.n[2];
    return {static_cast<char*>(base) + object * p.width[p.layers] * voxels * dtype_bytes(dtype), dtype, voxels,
            i0 * w.n[1] * w.n[2]};
  }
  long loss_bytes() const { return w.blocks * static_cast<long>(sizeof(double)); }
  Objective block_objective(const tcam_objective* o, long task) const {
    if (!o) return {};
    return {static_cast<Loss>(o->loss), o->beta, reinterpret_cast<double*>(w.losses) + task};
  }
  double total_loss() const {
    double sum = 0;
    for (long q = 0; q < w.blocks; ++q) sum += reinterpret_cast<const double*>(w.losses)[q];
    return sum;
  }
  static void copy_bias(void* dst, const void* bias, long n, long padded) {
    std::memset(dst, 0, padded * sizeof(Real));
    if (bias) std::memcpy(dst, bias, n * sizeof(Real));
  }

  Block block(long task, long ni) const {
    const Range j = chunk(w.n[1], w.j_chunks, task / w.k_chunks), k = chunk(w.n[2], w.k_chunks, task % w.k_chunks);
    return {0, ni, j.lo, j.hi, k.lo, k.hi};
  }
  const Real* plane(const void* const planes[3], int q, long object) const {
    return static_cast<const Real*>(planes[q]) + object * w.c * w.texels[q];
  }

  void project(long object, const void* const planes[3]) {
    parallel_for(3 * texel_chunks, w.threads, [&](long task, int thread) {
      const int q = static_cast<int>(task / texel_chunks);
      const Range s = chunk(w.texels[q], texel_chunks, task % texel_chunks);
      w.real.project(plane(planes, q, object), w.c, w.texels[q], s.lo, s.hi, w.project_weights[q], w.n1, w.projected[q],
                     w.stride, w.scratch[thread]);
    });
    parallel_for(w.n[1], w.threads,
                 [&](long j, int) { map_row(1, taps[1][j], taps[2], nullptr, w.b + w.map_bytes(j * w.n[2])); });
  }

  // One row of a map: plane q at tap t of its rows, at every tap of its columns.
  void map_row(int q, const Taps& t, const std::vector<Taps>& columns, const void* bias, char* out) {
    const long m = w.plane_columns[q];
    for (size_t x = 0; x < columns.size(); ++x) {
      const Taps& u = columns[x];
      const void* src[4] = {w.projected[q] + w.map_bytes(t.lo * m + u.lo), w.projected[q] + w.map_bytes(t.lo * m + u.hi),
                            w.projected[q] + w.map_bytes(t.hi * m + u.lo), w.projected[q] + w.map_bytes(t.hi * m + u.hi)};
      const double k[4] = {t.w_lo * u.w_lo, t.w_lo * u.w_hi, t.w_hi * u.w_lo, t.w_hi * u.w_hi};
      w.real.bilinear_row(src, k, bias, out + w.map_bytes(static_cast<long>(x)), w.stride);
    }
  }

  Maps slab_maps(long i0, long ni) {
    parallel_for(2 * ni, w.threads, [&](long task, int) {
      const long i = task / 2;
      if (task % 2)
        map_row(2, taps[0][i0 + i], taps[2], nullptr, w.g + w.map_bytes(i * w.n[2]));
      else  // b_1 rides on A
        map_row(0, taps[0][i0 + i], taps[1], w.bias_1, w.a + w.map_bytes(i * w.n[1]));
    });
    return {w.a, w.b, w.g, w.n[1], w.n[2], w.stride};
  }

  // Sum the parts of dA and dG in block order and carry them along i to plane rows.
  void combine_slab(long i0, long ni) {
    auto combine = [&](char* parts, long count, long columns, long x, char* rows, char* bias_rows) {
      for (long i = 0; i < ni; ++i) {
        Real* total = reals(parts) + (i * columns + x) * w.stride;
        for (long q = 1; q < count; ++q) w.real.add_scaled(total, total + q * w.slab * columns * w.stride, 1.0, w.stride);
        const Taps& t = taps[0][i0 + i];
        w.real.add_scaled(reals(rows) + (t.lo * columns + x) * w.stride, total, t.w_lo, w.stride);
        w.real.add_scaled(reals(rows) + (t.hi * columns + x) * w.stride, total, t.w_hi, w.stride);
        if (bias_rows) w.real.add_scaled(reals(bias_rows) + x * w.stride, total, 1.0, w.stride);
      }
    };
    parallel_for(w.n[1] + w.n[2], w.threads, [&](long x, int) {
      if (x < w.n[1])
        combine(w.da, w.k_chunks, w.n[1], x, w.rows_xy, w.bias_1_rows);
      else
        combine(w.dg, w.j_chunks, w.n[2], x - w.n[1], w.rows_xz, nullptr);
    });
  }

  // The adjoint of resampling along a map's last axis: (rows, voxels) to (rows, texels).
  void columns_to_texels(const char* map, long rows, const std::vector<Taps>& columns, long m, char* out) {
    zero(out, w.map_bytes(rows * m));
    parallel_for(rows, w.threads, [&](long u, int) {
      for (size_t x = 0; x < columns.size(); ++x) {
        const Real* src =
            reinterpret_cast<const Real*>(map) + (u * static_cast<long>(columns.size()) + static_cast<long>(x)) * w.stride;
        const Taps& t = columns[x];
        w.real.add_scaled(reals(out) + (u * m + t.lo) * w.stride, src, t.w_lo, w.stride);
        w.real.add_scaled(reals(out) + (u * m + t.hi) * w.stride, src, t.w_hi, w.stride);
      }
    });
  }

  void gradients_to_texels() {
    zero(w.rows_yz, w.map_bytes(p.planes[1] * w.n[2]));
    parallel_for(w.n[2], w.threads, [&](long k, int) {
      for (long j = 0; j < w.n[1]; ++j) {
        const Real* src = reals(w.db) + (j * w.n[2] + k) * w.stride;
        const Taps& t = taps[1][j];
        w.real.add_scaled(reals(w.rows_yz) + (t.lo * w.n[2] + k) * w.stride, src, t.w_lo, w.stride);
        w.real.add_scaled(reals(w.rows_yz) + (t.hi * w.n[2] + k) * w.stride, src, t.w_hi, w.stride);
      }
    });
    columns_to_texels(w.rows_xy, p.planes[0], taps[1], p.planes[1], w.grad_projected[0]);
    columns_to_texels(w.rows_yz, p.planes[1], taps[2], p.planes[2], w.grad_projected[1]);
    columns_to_texels(w.rows_xz, p.planes[0], taps[2], p.planes[2], w.grad_projected[2]);
  }

  void unproject(long object, const void* const planes[3], void* const grad_planes[3]) {
    parallel_for(3 * texel_chunks, w.threads, [&](long task, int thread) {
      const int q = static_cast<int>(task / texel_chunks);
      const Range s = chunk(w.texels[q], texel_chunks, task % texel_chunks);
      w.real.unproject(w.grad_projected[q], w.stride, plane(planes, q, object), w.c, w.texels[q], s.lo, s.hi,
                       p.grad_planes ? w.unproject_weights[q] : nullptr, w.n1,
                       p.grad_planes ? static_cast<Real*>(grad_planes[q]) + object * w.c * w.texels[q] : nullptr,
                       p.grad_decoder ? reals(w.weight_parts) + task * w.weight_part() : nullptr, w.scratch[thread]);
    });
  }

  void write_decoder_gradients(void* const* grad_weights, void* const* grad_biases, long object) {
    const long c_padded = round_up(w.c, w.real.columns);
    auto weight = [&](int l) { return static_cast<Real*>(grad_weights[l - 1]) + object * p.width[l] * p.width[l - 1]; };
    auto bias = [&](int l) { return static_cast<Real*>(grad_biases[l - 1]) + object * p.width[l]; };
    for (long r = 0; r < w.n1; ++r) {
      for (int q = 0; q < 3; ++q)
        for (long x = 0; x < w.c; ++x) {
          Real sum = 0;
          for (long t = 0; t < texel_chunks; ++t)
            sum += reals(w.weight_parts)[(q * texel_chunks + t) * w.weight_part() + r * c_padded + x];
          weight(1)[r * 3 * w.c + q * w.c + x] = sum;
        }
      if (grad_biases[0]) {
        Real sum = 0;
        for (long j = 0; j < w.n[1]; ++j) sum += reals(w.bias_1_rows)[j * w.stride + r];
        bias(1)[r] = sum;
      }
    }
    for (int l = 2; l <= p.layers; ++l) {
      const long in = p.width[l - 1], out = p.width[l], padded = round_up(in, w.core.columns);
      parallel_for(out, w.threads, [&](long r, int) {
        const Real* sums = reals(w.sums);
        for (long x = 0; x < in; ++x) {
          Real sum = 0;
          for (long q = 0; q < w.blocks; ++q) sum += sums[q * w.block_sums + w.decoder.grad_offset[l] + r * padded + x];
          weight(l)[r * in + x] = sum;
        }
        if (grad_biases[l - 1]) {
          Real sum = 0;
          for (long q = 0; q < w.blocks; ++q) sum += sums[q * w.block_sums + w.decoder.grad_bias_offset[l] + r];
          bias(l)[r] = sum;
        }
      });
    }
  }
};

// f(a value of the type of the maps and sums)
template <class F>
void with_real(const tcam_decode_grid& problem, F f) {
  if (problem.dtype == TCAM_F64)
    f(double());
  else
    f(float());
}

template <class Real>
void run_resample(const Real* plane, long m0, long m1, long channels, long n0, long n1, bool align_corners, bool zeros,
                  int threads, Real* out) {
  parallel_for(n0, threads, [&](long i, int) {
    const Taps t = linear_taps(i, n0, static_cast<int>(m0), align_corners, zeros);
    for (long j = 0; j < n1; ++j) {
      const Taps u = linear_taps(j, n1, static_cast<int>(m1), align_corners, zeros);
      const Real k[4] = {static_cast<Real>(t.w_lo * u.w_lo), static_cast<Real>(t.w_lo * u.w_hi),
                         static_cast<Real>(t.w_hi * u.w_lo), static_cast<Real>(t.w_hi * u.w_hi)};
      const Real *p0 = plane + (t.lo * m1 + u.lo) * channels, *p1 = plane + (t.lo * m1 + u.hi) * channels,
                 *p2 = plane + (t.hi * m1 + u.lo) * channels, *p3 = plane + (t.hi * m1 + u.hi) * channels;
      Real* row = out + (i * n1 + j) * channels;
      for (long x = 0; x < channels; ++x) row[x] = k[0] * p0[x] + k[1] * p1[x] + k[2] * p2[x] + k[3] * p3[x];
    }
  });
}

}  // namespace
}  // namespace tcam

extern "C" {

int64_t tcam_decode_grid_cpu_workspace(const tcam_decode_grid* problem, int backward) {
  return tcam::Plan(*problem, backward != 0, nullptr).bytes;
}

void tcam_decode_grid_cpu(const tcam_decode_grid* problem, const void* const planes[3], const void* const* weights,
                          const void* const* biases, void* volume, void* workspace) {
  const tcam::Plan plan(*problem, false, workspace);
  tcam::with_real(
      *problem, [&](auto real) { tcam::Run<decltype(real)>(plan, weights, biases).forward(planes, volume, nullptr, nullptr); });
}

void tcam_decode_grid_backward_cpu(const tcam_decode_grid* problem, const void* grad_volume, const void* const planes[3],
                                   const void* const* weights, const void* const* biases, void* const grad_planes[3],
                                   void* const* grad_weights, void* const* grad_biases, void* workspace) {
  const tcam::Plan plan(*problem, true, workspace);
  tcam::with_real(*problem, [&](auto real) {
    tcam::Run<decltype(real)>(plan, weights, biases)
        .backward(grad_volume, nullptr, nullptr, planes, grad_planes, grad_weights, grad_biases);
  });
}

void tcam_decode_grid_loss_cpu(const tcam_decode_grid* problem, const tcam_objective* objective, const void* const planes[3],
                               const void* const* weights, const void* const* biases, double* losses,
                               void* const grad_planes[3], void* const* grad_weights, void* const* grad_biases,
                               void* workspace) {
  const bool gradients = problem->grad_planes || problem->grad_decoder;
  const tcam::Plan plan(*problem, gradients, workspace);
  tcam::with_real(*problem, [&](auto real) {
    tcam::Run<decltype(real)> run(plan, weights, biases);
    if (gradients)
      run.backward(objective->target, objective, losses, planes, grad_planes, grad_weights, grad_biases);
    else
      run.forward(planes, const_cast<void*>(objective->target), objective, losses);
  });
}

void tcam_resample_plane_cpu(const void* plane, int64_t m0, int64_t m1, int64_t channels, int64_t n0, int64_t n1,
                             int align_corners, int padding, int dtype, int threads, void* out) {
  const bool zeros = padding == TCAM_PAD_ZEROS;
  if (dtype == TCAM_F64)
    tcam::run_resample(static_cast<const double*>(plane), m0, m1, channels, n0, n1, align_corners, zeros, threads,
                       static_cast<double*>(out));
  else
    tcam::run_resample(static_cast<const float*>(plane), m0, m1, channels, n0, n1, align_corners, zeros, threads,
                       static_cast<float*>(out));
}

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
