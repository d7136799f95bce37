// The emulator's versions of the functions of csrc/cuda/ptx.cuh, which includes this file outside any namespace.
#pragma once

namespace tcam {
namespace ptx {

inline void aligned(const void* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) & 15) simt::die(what);
}

// The copy completes at the wait and not earlier, so that a read before the wait sees old bytes. Under a schedule with early
// copies it completes at once, and may overwrite bytes that other threads still read.
inline void copy16(void* to, const void* from) {
  aligned(to, "cp.async: the shared address is not divisible by 16");
  aligned(from, "cp.async: the global address is not divisible by 16");
  if (simt::schedule.early_copies) memcpy(to, from, 16);
  simt::Unwatched u;
  if (!simt::machine->current->copies_seen) simt::machine->current->unseen.push_back(to);
  if (simt::schedule.early_copies) return;
  simt::machine->current->copies.push_back({to, from, simt::machine->current->groups});
}
inline void commit_copies() { ++simt::machine->current->groups; }
template <int but = 0>
void wait_copies() {
  auto& copies = simt::machine->current->copies;
  auto pending = copies.begin();
  for (; pending != copies.end() && pending->group + but < simt::machine->current->groups; ++pending)
    memcpy(pending->to, pending->from, 16);
  simt::Unwatched u;
  copies.erase(copies.begin(), pending);
}

template <bool transposed>
void load_matrices_as(uint32_t (&r)[4], const void* row) {
  simt::Fiber& me = *simt::machine->current;
  aligned(row, "ldmatrix: the address is not divisible by 16");
  me.address = row;
#if defined(__SANITIZE_THREAD__)
  for (int i = 0; i < 4; ++i)
    (void)static_cast<const volatile uint32_t*>(row)[i];  // a read that the sanitizer sees as this thread's
#endif
  simt::machine->warp_function(transposed ? 7 : 5, ~0u, [](int warp) {
    for (int l = 0; l < 32; ++l)
      for (int m = 0; m < 4; ++m)
        for (int h = 0; h < 2; ++h) {
          const int i = l / 4, j = l % 4 * 2 + h;  // row and column of the matrix as the lanes receive it
          const void* address = simt::machine->fiber(warp + m * 8 + (transposed ? j : i)).address;
          memcpy(reinterpret_cast<char*>(&simt::machine->fiber(warp + l).out[m]) + 2 * h,
                 static_cast<const char*>(address) + 2 * (transposed ? i : j), 2);
        }
  });
  memcpy(r, me.out, 16);
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { load_matrices_as<false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { load_matrices_as<true>(r, row); }

inline void store_matrices(void* row, const uint32_t (&r)[4]) {
  simt::Fiber& me = *simt::machine->current;
  aligned(row, "stmatrix: the address is not divisible by 16");
  me.address = row;
  memcpy(me.in, r, 16);
  simt::machine->warp_function(8, ~0u, [](int warp) {
    for (int row = 0; row < 32; ++row) {
      simt::Fiber& of = simt::machine->fiber(warp + row);
      for (int t = 0; t < 4; ++t) memcpy(&of.out[t], &simt::machine->fiber(warp + row % 8 * 4 + t).in[row / 8], 4);
    }
  });
  memcpy(row, me.out, 16);  // a write that the sanitizer sees as this thread's
  simt::Unwatched u;
  me.unseen.push_back(row);
}

inline void barrier_wait(int id, int threads) { simt::machine->named_barrier(id, threads, true); }
inline void barrier_arrive(int id, int threads) { simt::machine->named_barrier(id, threads, false); }

inline uint32_t spread_signs(uint32_t v) { return (v >> 31 ? 0xffff0000u : 0) | (v >> 15 & 1 ? 0xffffu : 0); }

inline void forget(int&) {}
inline void prefetch(const void*) {}

inline void load_pair(float* r, const float* p) {
  if (reinterpret_cast<uintptr_t>(p) & 7) simt::die("a load of two floats: the address is not divisible by 8");
  r[0] = p[0];
  r[1] = p[1];
}

// Gives the lanes of a warp their accumulators of an m16n8 tile.
inline void give(const float (&C)[16][8], int warp) {
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 4; ++r)
      memcpy(&simt::machine->fiber(warp + l).out[r], &C[l / 4 + (r >> 1) * 8][l % 4 * 2 + (r & 1)], 4);
}

// m16n8k16 with the fragments of the PTX ISA: g = lane / 4, t = lane % 4.
template <class Format>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, const float (&c)[4]) {
  simt::Fiber& me = *simt::machine->current;
  memcpy(me.in, a, 16);
  memcpy(me.in + 4, b, 8);
  simt::machine->warp_function(6, ~0u, [](int warp) {
    float A[16][16], B[16][8], C[16][8] = {};
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      const uint32_t* x = simt::machine->fiber(warp + l).in;
      for (int h = 0; h < 2; ++h) {
        for (int r = 0; r < 4; ++r)
          A[g + (r & 1) * 8][t * 2 + h + (r >> 1) * 8] = Format::widen(static_cast<uint16_t>(x[r] >> (16 * h)));
        for (int r = 0; r < 2; ++r) B[t * 2 + h + r * 8][g] = Format::widen(static_cast<uint16_t>(x[4 + r] >> (16 * h)));
      }
    }
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 8; ++j) C[i][j] += A[i][k] * B[k][j];
    give(C, warp);
  });
  float product[4];
  memcpy(product, me.out, 16);
  for (int r = 0; r < 4; ++r) d[r] = product[r] + c[r];
}

// Rounds to nearest, half away from zero, as cvt.rna does.
inline uint32_t to_tensor_float(float x) {
  const uint32_t u = Bits::of(x);
  return (u & 0x7f800000u) == 0x7f800000u ? u : (u + 0x1000u) & ~0x1fffu;
}

// m16n8k8.
inline void mma_tensor_float(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::Fiber& me = *simt::machine->current;
  memcpy(me.in, a, 16);
  memcpy(me.in + 4, b, 8);
  simt::machine->warp_function(9, ~0u, [](int warp) {
    float A[16][8], B[8][8], C[16][8] = {};
    for (int l = 0; l < 32; ++l) {
      const uint32_t* x = simt::machine->fiber(warp + l).in;
      for (int r = 0; r < 4; ++r) A[l / 4 + (r & 1) * 8][l % 4 + (r >> 1) * 4] = Bits::value(x[r] & ~0x1fffu);
      for (int r = 0; r < 2; ++r) B[l % 4 + r * 4][l / 4] = Bits::value(x[4 + r] & ~0x1fffu);
    }
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 8; ++k)
        for (int j = 0; j < 8; ++j) C[i][j] += A[i][k] * B[k][j];
    give(C, warp);
  });
  float product[4];
  memcpy(product, me.out, 16);
  for (int r = 0; r < 4; ++r) d[r] += product[r];
}

template <class Format>
struct Packed {
  static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, const float (&c)[4]) {
    multiply<Format>(d, a, b, c);
  }
  static float lo(uint32_t v) { return Format::widen(static_cast<uint16_t>(v)); }
  static float hi(uint32_t v) { return Format::widen(static_cast<uint16_t>(v >> 16)); }
  static uint32_t pack(float a, float b) { return Format::round(a) | static_cast<uint32_t>(Format::round(b)) << 16; }
  static uint32_t pack_relu(float a, float b) { return pack(a != a || a > 0 ? a : 0.f, b != b || b > 0 ? b : 0.f); }
  static uint32_t note_positive(uint32_t word, uint32_t h, int k) {
    return word | static_cast<uint32_t>(!(lo(h) <= 0)) << k | static_cast<uint32_t>(!(hi(h) <= 0)) << (k + 16);
  }
  static uint32_t add(uint32_t a, uint32_t b) { return pack(lo(a) + lo(b), hi(a) + hi(b)); }
  static uint32_t add_relu(uint32_t a, uint32_t b) { return pack_relu(lo(a) + lo(b), hi(a) + hi(b)); }
};

struct BFloat16 : Packed<BFloat16> {
  static constexpr int dtype = TCAM_BF16;
  static constexpr uint32_t ones = 0x3f803f80u;
  static uint16_t round(float x) { return Bits::to_bfloat(x); }
  static float widen(uint16_t x) { return Bits::bfloat(x); }
};
struct Float16 : Packed<Float16> {
  static constexpr int dtype = TCAM_F16;
  static constexpr uint32_t ones = 0x3c003c00u;
  static uint16_t round(float x) { return Bits::to_half(x); }
  static float widen(uint16_t x) { return Bits::half(x); }
};

}  // namespace ptx
}  // namespace tcam
