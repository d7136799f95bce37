// Vectors for one instruction set. Included only by voxel_core.cpp, which is compiled once per set with TCAM_ISA (a namespace)
// and TCAM_VECTOR_BYTES. The compiler's vector types make the same text compile to SSE, AVX2, AVX-512 or NEON.
//
// The rules: no templates of the standard library and no shared inline functions, because the linker could keep a copy compiled
// for a newer instruction set for all callers.
#pragma once
#include <stdint.h>
#include <string.h>

#include "../maths/half.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(TCAM_EMULATE_BF16)  // vectors wider than the machine's are in memory
#define TCAM_VECTOR_REGISTER "+m"
#elif defined(__AVX512F__)  // an asm operand in any vector register
#define TCAM_VECTOR_REGISTER "+v"
#elif defined(__aarch64__)
#define TCAM_VECTOR_REGISTER "+w"
#else
#define TCAM_VECTOR_REGISTER "+x"
#endif

#define TCAM_INLINE static inline __attribute__((always_inline))

namespace tcam {
namespace TCAM_ISA {

constexpr int register_rows = TCAM_VECTOR_BYTES == 64 ? 12 : 6;  // of the sums of a product that vector registers hold

typedef float VecF __attribute__((vector_size(TCAM_VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(TCAM_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(TCAM_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(TCAM_VECTOR_BYTES)));
typedef uint16_t HalfU __attribute__((vector_size(TCAM_VECTOR_BYTES / 2)));

template <class V, class T>
TCAM_INLINE V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
TCAM_INLINE void store(T* p, V v) {
  memcpy(p, &v, sizeof v);
}

// ---- float32 arithmetic for maths/activation.h -----------------------------------------

struct MathsF {
  using V = VecF;
  static constexpr int lanes = TCAM_VECTOR_BYTES / 4;
  TCAM_INLINE V splat(double x) { return static_cast<float>(x) - V{}; }
  TCAM_INLINE V select(VecI mask, V a, V b) { return mask ? a : b; }

  // exp(x) = 2^n exp(r) with x = n ln2 + r, |r| <= ln2/2; exp(r) is a Taylor polynomial of degree 7 (error 1 ulp).
  TCAM_INLINE V exp(V x) {
    x = select(x > splat(88.3), splat(88.3), select(x < splat(-87.3), splat(-87.3), x));
    const V magic = splat(12582912.0);  // 1.5 * 2^23: adding it rounds to an integer
    const V n = (x * splat(1.4426950408889634) + magic) - magic;
    V r = x - n * splat(0.693359375);
    r = r - n * splat(-2.12194440e-4);
    V p = splat(1.0 / 5040);
    p = p * r + splat(1.0 / 720);
    p = p * r + splat(1.0 / 120);
    p = p * r + splat(1.0 / 24);
    p = p * r + splat(1.0 / 6);
    p = p * r + splat(0.5);
    p = p * r + splat(1);
    p = p * r + splat(1);
    const VecI ok = x == x;  // the integer part of NaN is undefined: use 0
    const VecI e = __builtin_convertvector(ok ? n : V{}, VecI);
    return p * reinterpret<V>((e + 127) << 23);
  }

  // log1p(x) on (0, 1], which is all that softplus needs, as log(u) x/(u - 1) with u = 1 + x, which corrects the rounding of u.
  // log(u) uses u = 2^k m with m in [sqrt(1/2), sqrt(2)) and the series of atanh.
  TCAM_INLINE V log1p(V x) {
    const V u = splat(1) + x;
    const VecI bits = reinterpret<VecI>(u) - 0x3f3504f3;
    const V k = __builtin_convertvector(bits >> 23, V);
    const V m = reinterpret<V>((bits & 0x007fffff) + 0x3f3504f3);
    const V s = (m - splat(1)) / (m + splat(1)), s2 = s * s;
    V p = splat(2.0 / 9);
    p = p * s2 + splat(2.0 / 7);
    p = p * s2 + splat(2.0 / 5);
    p = p * s2 + splat(2.0 / 3);
    const V log_u = k * splat(0.6931471805599453) + (s * s2 * p + s + s);
    const V d = u - splat(1);
    return select(d == splat(0), x, log_u * (x / select(d == splat(0), splat(1), d)));
  }

  // tanh(x): an odd Taylor polynomial near 0, which does not cancel, and 1 - 2/(exp(2|x|) + 1) elsewhere.
  TCAM_INLINE V tanh(V x) {
    const V a = select(x < splat(0), -x, x), x2 = x * x;
    V p = splat(-1382.0 / 155925);
    p = p * x2 + splat(62.0 / 2835);
    p = p * x2 + splat(-17.0 / 315);
    p = p * x2 + splat(2.0 / 15);
    p = p * x2 + splat(-1.0 / 3);
    const V near = x + x * x2 * p;
    const V far = splat(1) - splat(2) / (exp(a + a) + splat(1));
    return select(a < splat(0.3), near, select(x < splat(0), -far, far));
  }

  // sin(x + quarters pi/2) from x = n pi/2 + r with |r| <= pi/4, by the three-part reduction of Cody and Waite and the
  // polynomials of Cephes. Above 8192 that reduction is inaccurate: one libm call per lane.
  TCAM_INLINE V sin_of(V x, int quarters) {
    const VecI far = (x > splat(8192)) | (x < splat(-8192));
    uint64_t words[TCAM_VECTOR_BYTES / 8], any = 0;
    memcpy(words, &far, sizeof far);
    for (int w = 0; w < TCAM_VECTOR_BYTES / 8; ++w) any |= words[w];
    if (any) {
      for (int l = 0; l < lanes; ++l) x[l] = quarters ? __builtin_cosf(x[l]) : __builtin_sinf(x[l]);
      return x;
    }
    const V magic = splat(12582912.0);  // as in exp
    const V n = (x * splat(0.6366197723675814) + magic) - magic;
    V r = x - n * splat(1.5703125);
    r = r - n * splat(4.837512969970703125e-4);
    r = r - n * splat(7.549789948768648e-8);
    const VecI ok = x == x;
    const VecI q = __builtin_convertvector(ok ? n : V{}, VecI) + quarters;
    const V r2 = r * r;
    V s = splat(-1.9515295891e-4);
    s = s * r2 + splat(8.3321608736e-3);
    s = s * r2 + splat(-1.6666654611e-1);
    s = s * r2 * r + r;
    V c = splat(2.443315711809948e-5);
    c = c * r2 + splat(-1.388731625493765e-3);
    c = c * r2 + splat(4.166664568298827e-2);
    c = c * r2 * r2 + (splat(1) - r2 * splat(0.5));
    const V y = select((q & 1) != 0, c, s);
    return select((q & 2) != 0, -y, y);
  }
  TCAM_INLINE V sin(V x) { return sin_of(x, 0); }
  TCAM_INLINE V cos(V x) { return sin_of(x, 1); }

  // Phi(x) = erfc(-x/sqrt 2)/2; erfc by Abramowitz and Stegun 7.1.26 (1.5e-7).
  TCAM_INLINE V normal_cdf(V x) {
    const V a = select(x < splat(0), -x, x) * splat(0.7071067811865476);
    const V t = splat(1) / (splat(1) + a * splat(0.3275911));
    V p = splat(1.061405429);
    p = p * t + splat(-1.453152027);
    p = p * t + splat(1.421413741);
    p = p * t + splat(-0.284496736);
    p = p * t + splat(0.254829592);
    const V tail = p * t * exp(-a * a) * splat(0.5);
    return select(x < splat(0), tail, splat(1) - tail);
  }

  template <class To, class From>
  TCAM_INLINE To reinterpret(From v) {
    return (To)v;
  }
};

// ---- float64 arithmetic: one libm call per lane ----------------------------------------

struct MathsD {
  using V = VecD;
  static constexpr int lanes = TCAM_VECTOR_BYTES / 8;
  typedef int64_t Mask __attribute__((vector_size(TCAM_VECTOR_BYTES)));
  TCAM_INLINE V splat(double x) { return x - V{}; }
  TCAM_INLINE V select(Mask mask, V a, V b) { return mask ? a : b; }
#define TCAM_LANES(name)                                           \
  TCAM_INLINE V name(V x) {                                        \
    V y = x;                                                       \
    for (int l = 0; l < lanes; ++l) y[l] = __builtin_##name(x[l]); \
    return y;                                                      \
  }
  TCAM_LANES(exp)
  TCAM_LANES(log1p)
  TCAM_LANES(tanh)
  TCAM_LANES(sin)
  TCAM_LANES(cos)
  TCAM_LANES(erfc)
#undef TCAM_LANES
  TCAM_INLINE V normal_cdf(V x) { return erfc(x * splat(-0.7071067811865476)) * splat(0.5); }
};

// ---- the three number formats of the products ------------------------------------------
// A product contracts words: a float, a double, or a pair of bfloat16 that are neighbours in the contraction. `Real` is the
// type of sums, biases and maps. A product's sums are blocks of `rows` rows, and its words are padded with zeros to a multiple
// of `group`. A thread multiplies between begin() and end().
struct InRegisters {
  static constexpr int rows = register_rows, group = 1;
  TCAM_INLINE void begin() {}
  TCAM_INLINE void end() {}
};

struct F32 : InRegisters {
  using Real = float;
  using Word = float;
  using Vec = VecF;
  using WordVec = VecF;
  using Arith = MathsF;
  static constexpr int pack = 1, lanes = MathsF::lanes;
  TCAM_INLINE Vec dot(Vec sum, WordVec a, WordVec b) { return sum + a * b; }
  TCAM_INLINE WordVec broadcast(const Word* p) { return *p - WordVec{}; }
  TCAM_INLINE void put(Word* row, long column, Vec v) { store(row + column, v); }
  TCAM_INLINE Vec get(const Word* row, long column) { return load<Vec>(row + column); }
  TCAM_INLINE Word make(const Real* v, int) { return v[0]; }
};

struct F64 : InRegisters {
  using Real = double;
  using Word = double;
  using Vec = VecD;
  using WordVec = VecD;
  using Arith = MathsD;
  static constexpr int pack = 1, lanes = MathsD::lanes;
  TCAM_INLINE Vec dot(Vec sum, WordVec a, WordVec b) { return sum + a * b; }
  TCAM_INLINE WordVec broadcast(const Word* p) { return *p - WordVec{}; }
  TCAM_INLINE void put(Word* row, long column, Vec v) { store(row + column, v); }
  TCAM_INLINE Vec get(const Word* row, long column) { return load<Vec>(row + column); }
  TCAM_INLINE Word make(const Real* v, int) { return v[0]; }
};

#if defined(__AVX512BF16__) || defined(TCAM_EMULATE_BF16)
#define TCAM_HAS_BF16 1
struct BF16 : InRegisters {
  using Real = float;
  using Word = uint32_t;
  using Vec = VecF;
  using WordVec = VecU;
  using Arith = MathsF;
  static constexpr int pack = 2, lanes = MathsF::lanes;

  TCAM_INLINE Word make(const Real* v, int n) {
    return Bits::to_bfloat(v[0]) | (n > 1 ? static_cast<uint32_t>(Bits::to_bfloat(v[1])) << 16 : 0);
  }
  TCAM_INLINE WordVec broadcast(const Word* p) { return *p - WordVec{}; }
  TCAM_INLINE Vec get(const Word* row, long column) {
    const HalfU h = load<HalfU>(reinterpret_cast<const uint16_t*>(row) + column);
    return (Vec)(__builtin_convertvector(h, VecU) << 16);
  }
  // One row of words from rows a (low halves) and b (high halves) of bfloat16.
  TCAM_INLINE WordVec interleave(const Word* a, const Word* b, long column) {
    const HalfU x = load<HalfU>(reinterpret_cast<const uint16_t*>(a) + column);
    const HalfU y = load<HalfU>(reinterpret_cast<const uint16_t*>(b) + column);
    return __builtin_convertvector(x, VecU) | (__builtin_convertvector(y, VecU) << 16);
  }
#if defined(__AVX512BF16__)
  TCAM_INLINE Vec dot(Vec sum, WordVec a, WordVec b) { return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
  TCAM_INLINE void put(Word* row, long column, Vec v) {
    store(reinterpret_cast<uint16_t*>(row) + column, _mm512_cvtneps_pbh((__m512)v));
  }
#else  // the same words by ordinary arithmetic, so that tests run this code on any machine
  TCAM_INLINE Vec dot(Vec sum, WordVec a, WordVec b) {
    sum = sum + (Vec)(a << 16) * (Vec)(b << 16);
    return sum + (Vec)(a & 0xffff0000u) * (Vec)(b & 0xffff0000u);
  }
  TCAM_INLINE void put(Word* row, long column, Vec v) {
    const VecU u = (VecU)v;
    const VecU r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const VecU w = (v == v) ? r : ((u >> 16) | 0x40);
    store(reinterpret_cast<uint16_t*>(row) + column, __builtin_convertvector(w, HalfU));
  }
#endif
};
#endif

}  // namespace TCAM_ISA
}  // namespace tcam
