// The emulator's versions of the functions of csrc/cuda/warpgroup.cuh, which includes this file outside any namespace.
//
// Products are asynchronous: their operands in shared memory are read, and their sums become visible, at the wait, or at once
// under a schedule with early copies. Until the wait the accumulators are NaN.
#pragma once

namespace tcam {
namespace ptx {

inline void warpgroup_fence() { simt::machine->current->fenced = true; }
inline void warpgroup_commit() { ++simt::machine->current->group; }

inline void products_fence() {
  simt::Unwatched u;
  simt::machine->current->copies_seen = true;
  simt::machine->current->unseen.clear();
}

// An operand's address takes the place of its descriptor.
struct Operand {
  const uint16_t* rows;
  int leading;
  explicit Operand(const uint16_t* at, int next = 8) : rows(at), leading(next) {}
  Operand at(int offset) const { return Operand(rows + offset, leading); }
};

// Element (row, column) of an operand in shared memory, rows of 64.
template <class T>
float operand(const uint16_t* rows, int row, int column) {
  return T::widen(rows[row * 64 + ((column / 8 ^ (row & 7)) << 3) + column % 8]);
}

// One warp's 16 rows of a product, in `wide` of its lanes.
template <class T, int columns>
void multiply_rows(const simt::Fiber::Product& p) {
  simt::Fiber& me = *simt::machine->current;
  memcpy(me.in, p.a, 16);
  me.address = &p;
  simt::machine->warp_function(10, ~0u, [](int warp) {
    const auto& first = *static_cast<const simt::Fiber::Product*>(simt::machine->fiber(warp).address);
    float A[16][16], C[16][columns] = {};
    for (int l = 0; l < 32; ++l) {
      const simt::Fiber& f = simt::machine->fiber(warp + l);
      const auto& mine = *static_cast<const simt::Fiber::Product*>(f.address);
      if (mine.rows != first.rows || mine.a_rows != first.a_rows || mine.k_step != first.k_step)
        simt::die("wgmma: lanes with different descriptors");
      for (int r = 0; r < 4; ++r)
        for (int h = 0; h < 2; ++h) {
          const int i = l / 4 + (r & 1) * 8, k = l % 4 * 2 + h + (r >> 1) * 8;
          A[i][k] = first.a_rows ? operand<T>(first.a_rows, k, warp / 32 % 4 * 16 + i)
                                 : T::widen(static_cast<uint16_t>(f.in[r] >> (16 * h)));
        }
    }
    for (int n = 0; n < columns; ++n)
      for (int k = 0; k < 16; ++k) {
        const float b = first.a_rows ? operand<T>(first.rows + n / 64 * first.block, k, n % 64)
                                     : operand<T>(first.rows, n, first.k_step * 16 + k);
        for (int i = 0; i < 16; ++i) C[i][n] += A[i][k] * b;
      }
    for (int l = 0; l < 32; ++l)
      for (int n = 0; n < columns / 8; ++n)
        for (int r = 0; r < 4; ++r)
          simt::machine->fiber(warp + l).wide[n * 4 + r] = C[l / 4 + (r >> 1) * 8][n * 8 + l % 4 * 2 + (r & 1)];
  });
}

template <class T>
void run_product(const simt::Fiber::Product& p) {
#if defined(__SANITIZE_THREAD__)
  const int lane = simt::machine->current->lane;  // reads of the operands that the sanitizer sees as this thread's
  auto read = [](const uint16_t* row) {
    for (int i = 0; i < 64; i += 2) (void)*reinterpret_cast<const volatile uint32_t*>(row + i);
  };
  if (p.a_rows)
    for (int n = 0; n < p.columns / 64; ++n) read(p.rows + n * p.block + lane % 16 * 64), read(p.a_rows + lane % 16 * 64);
  else
    for (int n = lane; n < p.columns; n += 32) read(p.rows + n * 64);
#endif
  if (p.columns == 64)
    multiply_rows<T, 64>(p);
  else
    multiply_rows<T, 128>(p);
  for (int r = 0; r < p.columns / 2; ++r) p.to[r] += simt::machine->current->wide[r];
}

inline void warpgroup_wait() {
  simt::Fiber& me = *simt::machine->current;
  me.fenced = false;
  for (const simt::Fiber::Product& p : me.products) {
    if (p.group == me.group) simt::die("wgmma: a wait for products whose group is not closed");
    if (p.first) memcpy(p.to, p.before, static_cast<size_t>(p.columns) * 2);
    p.run(p);
  }
  me.products.clear();
}

// Starts a product: at the wait, or at once under a schedule with early copies. Until then its accumulators are NaN.
template <class T, int accumulators>
void start_product(float (&d)[accumulators], simt::Fiber::Product p) {
  simt::Fiber& me = *simt::machine->current;
  if (!me.fenced) simt::die("wgmma: no fence of registers before it");
  if (simt::schedule.early_copies) return run_product<T>(p);
  simt::Unwatched u;
  for (const simt::Fiber::Product& before : me.products) p.first = p.first && before.to != d;
  if (p.first) memcpy(p.before, d, sizeof d);
  memset(static_cast<void*>(d), 0xff, sizeof d);
  me.products.push_back(p);
}

// Stops where a thread wrote to an operand without products_fence after it.
inline void seen(const uint16_t* rows, int count) {
  simt::Unwatched u;
  for (int l = 0; simt::machine->is_thread(l); ++l)
    for (const void* at : simt::machine->fiber(l).unseen)
      if (at >= rows && at < rows + count) simt::die("wgmma: its operand was written without a fence after it");
}

template <class T, bool first, int accumulators>
void warpgroup_product(float (&d)[accumulators], const uint32_t (&a)[4], const Operand& b, int k_step) {
  constexpr int columns = 2 * accumulators;
  aligned(b.rows, "wgmma: the shared address is not divisible by 16");
  seen(b.rows, columns * 64);
  const int group = simt::machine->current->group;
  if (first) memset(d, 0, sizeof d);
  start_product<T>(d, {d, columns, {}, true, {a[0], a[1], a[2], a[3]}, nullptr, b.rows, k_step, 0, group, run_product<T>});
}

template <class T, int accumulators>
void warpgroup_outer_product(float (&d)[accumulators], const Operand& a, const Operand& b) {
  aligned(a.rows, "wgmma: the shared address is not divisible by 16");
  aligned(b.rows, "wgmma: the shared address is not divisible by 16");
  seen(a.rows, 16 * 64);
  for (int n = 0; n < accumulators / 32; ++n) seen(b.rows + n * b.leading, 16 * 64);
  const int group = simt::machine->current->group;
  start_product<T>(d, {d, 2 * accumulators, {}, true, {}, a.rows, b.rows, 0, b.leading, group, run_product<T>});
}

}  // namespace ptx
}  // namespace tcam
