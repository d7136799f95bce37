// The emulator's versions of the functions of csrc/cuda/warpgroup.cuh, which includes this file outside any namespace.
//
// Products are asynchronous: their operands in shared memory are read, and their sums become visible, at the wait, or at once
// under a schedule with early copies. Until the wait the accumulators are NaN.
#pragma once

namespace tcam {
namespace ptx {

inline void warpgroup_fence() { simt::machine->current->fenced = true; }
inline void warpgroup_commit() { simt::machine->current->committed = simt::machine->current->products.size(); }

inline void products_fence() {
  simt::Unwatched u;
  simt::machine->current->copies_seen = true;
  simt::machine->current->unseen.clear();
}

template <int count>
void take_registers() {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256, "");
}
template <int count>
void release_registers() {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256, "");
}

// One warp's 16 rows of a product, in `wide` of its lanes.
template <class T, int columns>
void multiply_rows(const uint32_t (&a)[4], const uint16_t* rows, int k_step) {
  simt::Fiber& me = *simt::machine->current;
  memcpy(me.in, a, 16);
  me.address = rows;
  me.in[4] = static_cast<uint32_t>(k_step);
  simt::machine->warp_function(10, ~0u, [](int warp) {
    const simt::Fiber& first = simt::machine->fiber(warp);
    const uint16_t* at = static_cast<const uint16_t*>(first.address);
    float A[16][16], C[16][columns] = {};
    for (int l = 0; l < 32; ++l) {
      const simt::Fiber& f = simt::machine->fiber(warp + l);
      if (f.address != first.address || f.in[4] != first.in[4]) simt::die("wgmma: lanes with different descriptors");
      for (int r = 0; r < 4; ++r)
        for (int h = 0; h < 2; ++h)
          A[l / 4 + (r & 1) * 8][l % 4 * 2 + h + (r >> 1) * 8] = T::widen(static_cast<uint16_t>(f.in[r] >> (16 * h)));
    }
    for (int n = 0; n < columns; ++n)
      for (int k = 0; k < 16; ++k) {
        const int column = static_cast<int>(first.in[4]) * 16 + k;
        const float b = T::widen(at[n * 64 + ((column / 8 ^ (n & 7)) << 3) + column % 8]);
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
  if (p.columns == 64)
    multiply_rows<T, 64>(p.a, p.rows, p.k_step);
  else
    multiply_rows<T, 128>(p.a, p.rows, p.k_step);
  for (int r = 0; r < p.columns / 2; ++r) p.to[r] += simt::machine->current->wide[r];
}

// The fiber's products are all in one format, which the product leaves here for the wait.
inline thread_local void (*run_products)(const simt::Fiber::Product&) = nullptr;

inline void warpgroup_wait() {
  simt::Fiber& me = *simt::machine->current;
  me.fenced = false;
  for (size_t e = 0; e < me.committed; ++e) {
    const simt::Fiber::Product& p = me.products[e];
    if (p.first) memcpy(p.to, p.before, static_cast<size_t>(p.columns) * 2);
    run_products(p);
  }
  simt::Unwatched u;
  me.products.erase(me.products.begin(), me.products.begin() + static_cast<std::ptrdiff_t>(me.committed));
  me.committed = 0;
}

template <class T, int accumulators>
void warpgroup_product(float (&d)[accumulators], const uint32_t (&a)[4], const uint16_t* rows, int k_step) {
  constexpr int columns = 2 * accumulators;
  simt::Fiber& me = *simt::machine->current;
  aligned(rows, "wgmma: the shared address is not divisible by 16");
  if (!me.fenced) simt::die("wgmma: no fence of registers before it");
  {
    simt::Unwatched u;
    for (int l = 0; simt::machine->is_thread(l); ++l)
      for (const void* at : simt::machine->fiber(l).unseen)
        if (at >= rows && at < rows + columns * 64) simt::die("wgmma: its operand was copied without a fence after it");
  }
  run_products = run_product<T>;
  simt::Fiber::Product p = {d, columns, {}, true, {a[0], a[1], a[2], a[3]}, rows, k_step};
  if (simt::schedule.early_copies) return run_product<T>(p);
  simt::Unwatched u;
  for (const simt::Fiber::Product& before : me.products) p.first = p.first && before.to != d;
  if (p.first) memcpy(p.before, d, sizeof d);
  memset(static_cast<void*>(d), 0xff, sizeof d);
  me.products.push_back(p);
}

}  // namespace ptx
}  // namespace tcam
