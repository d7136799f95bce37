// The lanes of maths/noise.h for one instruction set. Included only by voxel_core.cpp, under the rules of simd.h.
#pragma once
#include "../maths/noise.h"
#include "simd.h"

namespace tcam {
namespace TCAM_ISA {

struct NoiseLanes {
  using V = VecF;
  using U = VecU;
  using I = VecI;
  static constexpr int lanes = TCAM_VECTOR_BYTES / 4;
  TCAM_INLINE V splat(float x) { return x - V{}; }
  TCAM_INLINE U splat(uint32_t x) { return x - U{}; }
  TCAM_INLINE V to_float(I i) { return __builtin_convertvector(i, V); }
  TCAM_INLINE V select(I odd, V a, V b) { return odd != 0 ? a : b; }
  TCAM_INLINE U bits(V x) { return (U)x; }
  TCAM_INLINE V floats(U u) { return (V)u; }

#if defined(__AVX512F__)
  TCAM_INLINE V fma(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
  TCAM_INLINE V sqrt(V x) { return (V)_mm512_sqrt_ps((__m512)x); }
  TCAM_INLINE void multiply(U a, uint32_t b, U& hi, U& lo) {
    const __m512i k = _mm512_set1_epi32(static_cast<int>(b));
    const __m512i even = _mm512_mul_epu32((__m512i)a, k), odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), k);
    lo = (U)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
    hi = (U)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  }
#elif defined(__AVX2__) && defined(__FMA__) && TCAM_VECTOR_BYTES == 32
  TCAM_INLINE V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  TCAM_INLINE V sqrt(V x) { return (V)_mm256_sqrt_ps((__m256)x); }
  TCAM_INLINE void multiply(U a, uint32_t b, U& hi, U& lo) {
    const __m256i k = _mm256_set1_epi32(static_cast<int>(b));
    const __m256i even = _mm256_mul_epu32((__m256i)a, k), odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), k);
    lo = (U)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    hi = (U)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  }
#else  // without an fma instruction: one library call per lane
  TCAM_INLINE V fma(V a, V b, V c) {
    for (int l = 0; l < lanes; ++l) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
    return c;
  }
  TCAM_INLINE V sqrt(V x) {
    for (int l = 0; l < lanes; ++l) x[l] = __builtin_sqrtf(x[l]);
    return x;
  }
  TCAM_INLINE void multiply(U a, uint32_t b, U& hi, U& lo) {
    for (int l = 0; l < lanes; ++l) {
      const uint64_t product = static_cast<uint64_t>(a[l]) * b;
      hi[l] = static_cast<uint32_t>(product >> 32), lo[l] = static_cast<uint32_t>(product);
    }
  }
#endif
};

static void normals(const NoiseKey& key, long count, long b0, long b1, float* out) {
  using Lanes = NoiseLanes;
  const long blocks = noise_blocks(count);
  Lanes::U lane;
  for (int l = 0; l < Lanes::lanes; ++l) lane[l] = static_cast<uint32_t>(l);
  for (long b = b0; b < b1; b += Lanes::lanes) {
    Lanes::V word[4];
    Noise<Lanes>::block(key, lane + static_cast<uint32_t>(b), word);
    for (int w = 0; w < 4; ++w) {
      const long at = w * blocks + b, word_end = w * blocks + b1, end = word_end < count ? word_end : count;
      if (at + Lanes::lanes <= end)
        store(out + at, word[w]);
      else
        for (long e = at; e < end; ++e) out[e] = word[w][e - at];
    }
  }
}

static void philox(uint32_t counter[4], uint32_t k0, uint32_t k1) {
  NoiseLanes::U c[4];
  for (int w = 0; w < 4; ++w) c[w] = NoiseLanes::splat(counter[w]);
  Noise<NoiseLanes>::philox(c, k0, k1);
  for (int w = 0; w < 4; ++w) counter[w] = c[w][NoiseLanes::lanes - 1];
}

}  // namespace TCAM_ISA
}  // namespace tcam
