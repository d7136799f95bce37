// bfloat16 products in AMX tiles. Included only by voxel_core.cpp, under the rules of simd.h.
//
// A register block is 32 x 32 sums in four tiles of 16 x 16. A step of the contraction loads 32 rows of A and 32 columns of B,
// 16 words each, in two tiles each, and multiplies every pair: four products of 16 cycles for four loads of 8.
#pragma once
#include "simd.h"

namespace tcam {
namespace TCAM_ISA {

#if defined(__AMX_BF16__) || defined(TCAM_EMULATE_AMX)
#define TCAM_HAS_TILES 1

struct AMX : BF16 {
  static constexpr int rows = 32, group = 16;
  struct Tiles;
  // Set and clear the shape of the thread's tiles, 16 rows of 64 bytes each.
  TCAM_INLINE void begin();
  TCAM_INLINE void end();
  TCAM_INLINE void transpose(const VecU (&in)[16], uint32_t* out, long pitch);
};

#if defined(__AMX_BF16__)
inline __attribute__((always_inline)) void AMX::begin() {
  struct {
    uint8_t palette, start_row, zero[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } shape = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(&shape);
}
inline __attribute__((always_inline)) void AMX::end() { _tile_release(); }

// The sums of a block: tiles 0 to 3 of the thread, so that one object may be in use at a time.
struct AMX::Tiles {
  // Rows of 32 reals, `pitch` reals apart; with pitch 0 every row is the one at `from`.
  TCAM_INLINE void load(const float* from, long pitch) {
    _tile_loadd(0, from, pitch * 4);
    _tile_loadd(1, from + 16, pitch * 4);
    _tile_loadd(2, from + 16 * pitch, pitch * 4);
    _tile_loadd(3, from + 16 * pitch + 16, pitch * 4);
  }
  TCAM_INLINE void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // Adds a (32, words) times b (words, 32), whose rows are a_pitch and b_pitch words apart.
  TCAM_INLINE void multiply(const uint32_t* a, long a_pitch, const uint32_t* b, long b_pitch, long words) {
    __asm__ volatile("" ::: "memory");  // the loads' operands do not name the memory that they read
    for (long k = 0; k < words; k += group) {
      _tile_loadd(4, a + k, a_pitch * 4);
      _tile_loadd(6, b + k * b_pitch, b_pitch * 4);
      _tile_loadd(7, b + k * b_pitch + 16, b_pitch * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a + 16 * a_pitch + k, a_pitch * 4);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  TCAM_INLINE void store(float* to, long pitch) {
    _tile_stored(0, to, pitch * 4);
    _tile_stored(1, to + 16, pitch * 4);
    _tile_stored(2, to + 16 * pitch, pitch * 4);
    _tile_stored(3, to + 16 * pitch + 16, pitch * 4);
    __asm__ volatile("" ::: "memory");
  }
};

// out (16 rows, `pitch` apart) = the transpose of 16 vectors of words.
inline __attribute__((always_inline)) void AMX::transpose(const VecU (&in)[16], uint32_t* out, long pitch) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)in[i], (__m512i)in[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)in[i], (__m512i)in[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // b[i + j]: in each quarter q, column 4q + j of rows i to i + 3
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), odd0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88),
                  odd1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    TCAM_ISA::store(out + j * pitch, _mm512_shuffle_i32x4(even0, even1, 0x88));
    TCAM_ISA::store(out + (4 + j) * pitch, _mm512_shuffle_i32x4(odd0, odd1, 0x88));
    TCAM_ISA::store(out + (8 + j) * pitch, _mm512_shuffle_i32x4(even0, even1, 0xdd));
    TCAM_ISA::store(out + (12 + j) * pitch, _mm512_shuffle_i32x4(odd0, odd1, 0xdd));
  }
}

#else  // the same tiles by ordinary arithmetic, so that tests run this code on any machine
inline void AMX::begin() {}
inline void AMX::end() {}

struct AMX::Tiles {
  float sum[32][32];
  void load(const float* from, long pitch) {
    for (int r = 0; r < 32; ++r) memcpy(sum[r], from + r * pitch, sizeof sum[r]);
  }
  void clear() { memset(sum, 0, sizeof sum); }
  static float half(uint32_t word, bool high) {
    const uint32_t bits = high ? word & 0xffff0000u : word << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
  void multiply(const uint32_t* a, long a_pitch, const uint32_t* b, long b_pitch, long words) {
    for (long k = 0; k < words; k += group)
      for (int r = 0; r < 32; ++r)
        for (int c = 0; c < 32; ++c) {  // a tile product sums the low and the high halves apart (TDPBF16PS)
          float low = 0, high = 0;
          for (long w = k; w < k + group; ++w) {
            const uint32_t x = a[r * a_pitch + w], y = b[w * b_pitch + c];
            low += half(x, false) * half(y, false), high += half(x, true) * half(y, true);
          }
          sum[r][c] += low + high;
        }
  }
  void store(float* to, long pitch) {
    for (int r = 0; r < 32; ++r) memcpy(to + r * pitch, sum[r], sizeof sum[r]);
  }
};

inline __attribute__((always_inline)) void AMX::transpose(const VecU (&in)[16], uint32_t* out, long pitch) {
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c) out[c * pitch + r] = in[r][c];
}
#endif
#endif

}  // namespace TCAM_ISA
}  // namespace tcam
