// The chain warps of the fused backward kernel: each takes a tile forward through the layers, computes the loss, and walks
// back.
#pragma once
#include "fused_backward_block.cuh"

namespace tcam {

template <class T, int N, int MT>
struct FusedBackwardChain : FusedBackwardBlock<T, N, MT> {
  using Base = FusedBackwardBlock<T, N, MT>;
  using Base::steps_of, Base::tile_threads, Base::chain_barrier, Base::written, Base::read, Base::forward_products;
  using Base::WI, Base::WJ, Base::R, Base::steps, Base::tile, Base::teams, Base::share, Base::lines, Base::words,
      Base::given_block;
  using typename Base::Team, typename Base::Fragment, typename Base::Memory, typename Base::Mask;

  // mask = where the numbers of h are positive. h is the output of a ReLU, so each number is positive or zero. Register
  // h[m][s][r] has word (m * steps + s) / 4: bit (s % 4) * 4 + r for its low half, 16 bits above for its high half.
  TCAM_DEVICE static void to_mask(Mask& mask, const Fragment& h) {
#pragma unroll
    for (int q = 0; q < words; ++q) mask.word[q] = 0;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          uint32_t& word = mask.word[(m * steps + s) / 4];
          word = T::note_positive(word, h[m][s][r], s % 4 * 4 + r);
        }
  }
  // Register [m][s][r] with each half set to zero where the mask has no bit for it.
  TCAM_DEVICE static uint32_t masked(uint32_t value, const Mask& mask, int m, int s, int r) {
    return value & ptx::spread_signs(mask.word[(m * steps + s) / 4] << (15 - (s % 4 * 4 + r)));
  }

  // This thread's mask of h_layer at step s in p.masks.
  TCAM_DEVICE static Mask& stored_mask(const FusedBackward& p, int layer, int steps_in_all, int s, int tid) {
    return static_cast<Mask*>(p.masks)[(static_cast<size_t>(layer - 2) * steps_in_all + s) * Team::threads + tid];
  }

  // Writes a fragment to the warp's rows of a given tile.
  TCAM_DEVICE static void store_tile(uint16_t* to, const Fragment& f, const Lane<N>& lane) {
    const int at = (lane.lane & 15) * 64 + (((lane.lane >> 4) ^ lane.swizzle) << 3);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int s = 0; s < steps; ++s)
        ptx::store_matrices(to + s / 4 * given_block + m * 16 * 64 + (at ^ (s % 4 << 4)), f[m][s]);
  }

  // The elements of p.volume, the target or the output's gradient, that a lane needs in the head. With several outputs entry n
  // is output t at row g + 8 n; with one output entry 0 is row g + 8 t, and the others are empty. Entries beyond the warp's
  // rows or the volume are zero. look() loads them at the start of the step, so that they have arrived when finish() needs
  // them.
  struct Seen {
    uint32_t loaded[lines];
    bool inside[lines];
  };
  TCAM_DEVICE static void look(Seen& seen, const FusedBackward& p, int i, int j, int k0, const Lane<N>& lane) {
    const bool one = p.n_out == 1;
    const int k = k0 + lane.g + (one ? lane.t * 8 : 0);
    const int64_t at =
        (one ? 0 : lane.t * p.channel_stride) + ((static_cast<int64_t>(i) * p.maps.nj + j) * p.maps.nk + k) * p.voxel_stride;
    const bool inside = i < p.maps.ni && j < p.maps.nj && lane.t < (one ? lines : p.n_out);
#pragma unroll
    for (int n = 0; n < lines; ++n) seen.loaded[n] = 0, seen.inside[n] = inside && k + n * 8 < p.maps.nk && (n == 0 || !one);
#pragma unroll
    for (int n = 0; n < lines; ++n)
      if (seen.inside[n]) seen.loaded[n] = Elements<float>::load(p.volume, p.dtype, at + n * 8 * p.voxel_stride);
  }

  // dy = dl/dy times p.scale at the elements of `seen`, from the output's accumulators `out`; their losses are added to `loss`.
  TCAM_DEVICE static void finish(const FusedBackward& p, const float (&out)[MT][4], const Lane<N>& lane, const Seen& seen,
                                 float (&dy)[lines], double& loss) {
    using L = LossMaths<Scalar<float>>;
    const bool one = p.n_out == 1;
    const float scale = p.scale ? *p.scale : 1.f;
#pragma unroll
    for (int n = 0; n < lines; ++n) {
      dy[n] = 0.f;
      if (!seen.inside[n]) continue;
      float y = out[n >> 1][(n & 1) * 2] + out[n >> 1][(n & 1) * 2 + 1];
      if (n == 0 && one)
#pragma unroll
        for (int q = 1; q < lines; ++q) y = lane.t == q ? out[q >> 1][(q & 1) * 2] + out[q >> 1][(q & 1) * 2 + 1] : y;
      float slope = Elements<float>::value(seen.loaded[n], p.dtype);
      if (p.compares) {
        const float difference = output_of<false>(p.output_activation, y) - slope;
        loss += static_cast<double>(L::value(p.loss, difference, p.beta));
        slope = L::slope(p.loss, difference, p.beta);
      }
      dy[n] = slope * output_slope_of<false>(p.output_activation, y) * scale;
    }
  }

  // A chain warp's position and buffers at one step: the voxels (i, j) from k0 on, the number s of steps_in_all steps, the
  // warp's rows of p.dy (n_out, R), and masks: in the head masks[0], in a later launch those of the layers from the top down to
  // p.layer. tile: the warp's tile in its block; warp and tid: in its team.
  struct Step {
    const FusedBackward& p;
    const Memory& memory;
    const typename Team::Stage& stage;
    const typename Team::Column& column;
    const Lane<N>& lane;
    int tid, warp, tile, s, steps_in_all, jb, i, j, k0;
    float* dy_at;
    Mask masks[fused_most_products];

    TCAM_DEVICE void meet() const { ptx::barrier_wait(chain_barrier + tile / WI, Team::threads); }
    // h = h_1. The step's maps have been staged. Where nothing else of the step reads them (`last`), those of the next step in
    // the column are staged after it.
    TCAM_DEVICE void first_layer(Fragment& h, bool last) const {
      ptx::wait_copies();
      meet();
#pragma unroll
      for (int q = 0; q < steps; ++q) Team::first_layer(h, q, stage, warp, lane);
      if (!last) return;
      meet();  // all warps have read the maps
      if (jb + 1 < column.j_last) Team::stage_step(stage, p.maps, column, jb + 1, tid);
    }
    // The warp's rows of the tiles that it gives.
    TCAM_DEVICE uint16_t* h_rows() const { return memory.given + tile * 2 * Base::tile + Team::first_row(warp) * 64; }
    TCAM_DEVICE uint16_t* delta_rows() const { return h_rows() + Base::tile; }
    // Writes h_(layer-1) for the outer warps, after they have read this tile of the step before.
    TCAM_DEVICE void give_h(const Fragment& h) const {
      ptx::barrier_wait(read + tile, tile_threads);
      store_tile(h_rows(), h, lane);
    }
    // Writes delta_layer and tells the outer warps that both are ready; called after give_h.
    TCAM_DEVICE void give_delta(const Fragment& delta) const {
      store_tile(delta_rows(), delta, lane);
      tell();
    }
    TCAM_DEVICE void tell() const {
      if (MT == 1) ptx::products_fence();
      ptx::barrier_arrive(written + tile, tile_threads);
    }
  };

  // Computes h from h_1 up to h_(layer-1) or, in the head, up to h_(P+1). The head stores the mask of each layer.
  TCAM_DEVICE static void walk_forward(Step& at, Fragment& h) {
    const FusedBackward& p = at.p;
    const int forward = forward_products(p);
    if (forward > 0) at.first_layer(h, p.layer > 2);
#pragma unroll 1
    for (int q = 0; q < forward; ++q) {
      Fragment next;
      Team::template multiply<2, true>(
          h, at.memory.panels + q * N * N, at.memory.biases + q * N, at.lane, [](int) {},
          [&](int s, int m, const float (&sum)[2][4]) { Team::to_operand(next[m][s], sum); });
      copy(h, next);
      if (p.head && p.masks) {
        to_mask(at.masks[0], h);
        stored_mask(p, q + 2, at.steps_in_all, at.s, at.tid) = at.masks[0];
      }
      if (p.weighted && q + 2 == p.layer - 1) at.give_h(h);
    }
  }

  // Computes the last layer, the loss and dy = dl/dy, and stores dy for later launches.
  TCAM_DEVICE static void head(const Step& at, const Fragment& h, const Seen& seen, float (&dy)[lines], double& loss,
                               double& dy_sum) {
    const FusedBackward& p = at.p;
    const Lane<N>& lane = at.lane;
    float out[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      out[m][0] = out[m][2] = at.memory.last_bias[lane.t];
      out[m][1] = out[m][3] = 0.f;
    }
#pragma unroll
    for (int q = 0; q < steps; ++q)
#pragma unroll
      for (int m = 0; m < MT; ++m) Team::add_last(out[m], h[m][q], at.memory.split_last, q, lane);
    finish(p, out, lane, seen, dy, loss);
    if (!p.masks) return;
    if (p.n_out == 1) {
      dy_sum += static_cast<double>(dy[0]);
      if (lane.t < lines) at.dy_at[lane.t * 8 + lane.g] = dy[0];
    } else if (lane.t < p.n_out) {
#pragma unroll
      for (int n = 0; n < lines; ++n) at.dy_at[lane.t * R + n * 8 + lane.g] = dy[n];
    }
  }

  // Takes h from delta_layer to delta_(layer-1): multiplied by the panel of `layer`, then masked by the mask of h_(layer-1).
  TCAM_DEVICE static void step_back(const Step& at, Fragment& h, int layer, const Mask& mask) {
    const int back = at.p.products + 1 - layer;
    const uint16_t* panel = at.memory.panels + (forward_products(at.p) + back) * N * N;
    Fragment next;
    Team::template multiply<2, false>(
        h, panel, nullptr, at.lane, [](int) {},
        [&](int s, int m, const float (&sum)[2][4]) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float* c = sum[r >> 1] + (r & 1) * 2;
            next[m][s][r] = masked(T::pack(c[0], c[1]), mask, m, s, r);
          }
        });
    copy(h, next);
  }

  // Walks from dl/dy down to delta_layer, which it gives to the outer warps; the launch of layer 2 continues to delta_1 and
  // writes it. On entry at.masks[0] is that of h_(P+1). h is overwritten; it is a parameter so that no second fragment needs
  // registers.
  TCAM_DEVICE static void walk_back(Step& at, Fragment& h, const float (&dy)[lines]) {
    const FusedBackward& p = at.p;
    const int top = p.products + 1;
    if (p.layer > top) {  // the last layer of several outputs: its delta is dy itself
      if (!p.weighted) return;
      store_outputs(at.delta_rows(), dy, at.lane);
      return at.tell();
    }
    if (p.n_out == 1)
      spread_one(h, dy, p.head, at.masks[0], at.lane);
    else
      spread(h, at.dy_at, p.n_out, at.memory.last, at.masks[0], at.lane);
#pragma unroll
    for (int u = 1; u < fused_most_products; ++u)
      if (top - u >= p.layer) step_back(at, h, top - u + 1, at.masks[u]);
    if (p.layer == 2) {  // h_1 is computed again, which saves the registers that keeping it or its mask would take
      Fragment h1;
      at.first_layer(h1, true);
      to_mask(at.masks[0], h1);
      if (p.weighted) at.give_h(h1);
    }
    if (p.weighted) at.give_delta(h);
    if (p.layer == 2) {
      step_back(at, h, 2, at.masks[0]);
      write_delta1(p, h, at.i, at.j, at.k0, at.lane);
    }
  }

  // Loads what a launch after the head reads at a step: masks and, with one output, dy. Prefetches those of the next step.
  TCAM_DEVICE static void load_step(Step& at, float (&dy)[lines], bool more) {
    const FusedBackward& p = at.p;
    const int top = p.products + 1;
#pragma unroll
    for (int u = 0; u < fused_most_products; ++u)
      if (top - u >= p.layer) {
        const Mask& from = stored_mask(p, top - u, at.steps_in_all, at.s, at.tid);
        at.masks[u] = from;
        if (more) ptx::prefetch(&from + Team::threads);
      }
#pragma unroll
    for (int n = 0; n < lines; ++n) dy[n] = p.n_out == 1 ? at.dy_at[n * 8 + at.lane.g] : 0.f;
    if (more) ptx::prefetch(at.dy_at + Team::tiles * R * p.n_out);
  }

  // The team's steps, for one chain warp. The team waits for its own warps alone. After the last step the head writes each
  // thread's sums of losses and of dy.
  TCAM_DEVICE static void chain(const FusedBackward& p, const Memory& memory) {
    Lane<N> lane;
    const int team = teams == 1 ? 0 : threadIdx.x / Team::threads, tid = threadIdx.x % Team::threads, warp = tid >> 5;
    const int first_row = Team::first_row(warp);
    const typename Team::Stage stage(memory.maps + team * Team::Stage::elements);
    const typename Team::Steps all = steps_of(p, team);
    // The warp's rows of p.dy at step s.
    auto dy_at = [&](int s) { return p.dy + (static_cast<size_t>(s) * Team::tiles + warp / share) * p.n_out * R + first_row; };
    double loss = 0, dy_sum = 0;
    int s = all.begin;
    while (s < all.end) {
      const typename Team::Column column(all, s);
      Team::stage_column(stage, p.maps, column, tid);
      Team::stage_step(stage, p.maps, column, column.j_first, tid);
#pragma unroll 1
      for (int jb = column.j_first; jb < column.j_last; ++jb, ++s) {
        lane.forget();
        const int i = column.i0 + warp / share % WI, j = jb * WJ + warp / share / WI;
        Step at = {p,        memory,
                   stage,    column,
                   lane,     tid,
                   warp,     team * WI + warp / share,
                   s,        all.count(),
                   jb,       i,
                   j,        column.k0 + first_row,
                   dy_at(s), {}};
        Seen seen;
        float dy[lines];
        if (p.head)
          look(seen, p, at.i, at.j, at.k0, lane);
        else
          load_step(at, dy, s + 1 < all.end);
        Fragment h;
        walk_forward(at, h);
        if (p.head) {
          head(at, h, seen, dy, loss, dy_sum);
          if (!p.masks) continue;
        }
        walk_back(at, h, dy);
      }
    }
    if (p.head) {
      p.losses[blockIdx.x * Base::chain_threads + threadIdx.x] = loss;
      p.dy_sums[blockIdx.x * Base::chain_threads + threadIdx.x] = dy_sum;
    }
  }

  TCAM_DEVICE static void copy(Fragment& to, const Fragment& from) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int r = 0; r < 4; ++r) to[m][s][r] = from[m][s][r];
  }

  // delta = delta_(P+1) of a single output without its factors w_r: dy where the mask is set. dy[n] is that of row g + 8 n; in
  // the head, lane t has row g + 8 t in dy[0].
  TCAM_DEVICE static void spread_one(Fragment& delta, const float (&dy)[lines], bool head, const Mask& mask,
                                     const Lane<N>& lane) {
    uint32_t pairs[lines];
#pragma unroll
    for (int n = 0; n < lines; ++n) {
      const float x = head ? __shfl_sync(0xffffffffu, dy[0], (lane.lane & ~3) | n) : dy[n];
      pairs[n] = T::pack(x, x);
    }
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int r = 0; r < 4; ++r) delta[m][s][r] = masked(pairs[m * 2 + (r & 1)], mask, m, s, r);
  }

  // delta = delta_(P+1) of several outputs: the sum over outputs of dy w, where the mask is set. dy_at: (n_out, R).
  TCAM_DEVICE static void spread(Fragment& delta, const float* dy_at, int n_out, const float* last, const Mask& mask,
                                 const Lane<N>& lane) {
    float dy[fused_most_out][lines];
#pragma unroll
    for (int o = 0; o < fused_most_out; ++o)
#pragma unroll
      for (int n = 0; n < lines; ++n) dy[o][n] = o < n_out ? dy_at[o * R + n * 8 + lane.g] : 0.f;
#pragma unroll
    for (int s = 0; s < steps; ++s)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float w[fused_most_out][2];
#pragma unroll
        for (int o = 0; o < fused_most_out; ++o) ptx::load_pair(w[o], last + o * N + s * 16 + e * 8 + lane.t * 2);
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float x[2] = {};
#pragma unroll
            for (int o = 0; o < fused_most_out; ++o)
#pragma unroll
              for (int c = 0; c < 2; ++c) x[c] += dy[o][m * 2 + r] * w[o][c];
            delta[m][s][e * 2 + r] = masked(T::pack(x[0], x[1]), mask, m, s, e * 2 + r);
          }
      }
  }

  // Writes delta_L to the warp's rows of a tile: output o in column o, zero in the other columns.
  TCAM_DEVICE static void store_outputs(uint16_t* to, const float (&dy)[lines], const Lane<N>& lane) {
    Fragment f;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int r = 0; r < 4; ++r) f[m][s][r] = 0;
#pragma unroll
    for (int n = 0; n < lines; ++n) {
      const float lo = __shfl_sync(0xffffffffu, dy[n], (lane.lane & ~3) | (lane.t * 2 & 3));
      const float hi = __shfl_sync(0xffffffffu, dy[n], (lane.lane & ~3) | ((lane.t * 2 + 1) & 3));
      f[n >> 1][0][n & 1] = lane.t < 2 ? T::pack(lo, hi) : 0;
    }
    store_tile(to, f, lane);
  }

  // Writes delta_1 of the warp's rows to p.delta1, 16 bytes at a time, in the order of delta1_column.
  TCAM_DEVICE static void write_delta1(const FusedBackward& p, const Fragment& f, int i, int j, int k0, const Lane<N>& lane) {
    if (i >= p.maps.ni || j >= p.maps.nj) return;
    uint16_t* row = p.delta1 + ((static_cast<size_t>(i) * p.maps.nj + j) * p.maps.nk + k0) * N;
#pragma unroll
    for (int n = 0; n < lines; ++n)
      if (k0 + n * 8 + lane.g < p.maps.nk)
#pragma unroll
        for (int q = 0; q < steps / 2; ++q)
          *reinterpret_cast<uint4*>(row + (n * 8 + lane.g) * N + q * 32 + lane.t * 8) = {
              f[n >> 1][2 * q][n & 1], f[n >> 1][2 * q][2 + (n & 1)], f[n >> 1][2 * q + 1][n & 1],
              f[n >> 1][2 * q + 1][2 + (n & 1)]};
  }
};

}  // namespace tcam
