// All inline PTX: asynchronous copies, matrix fragments, named barriers, tensor-core products, packed 16-bit arithmetic. The
// emulator has its own version of each function (tests/simt/ptx_simt.h).
#pragma once
#include "../maths/half.h"
#include "device.cuh"

#if defined(TCAM_SIMT)
#include "ptx_simt.h"
#else

namespace tcam {
namespace ptx {

TCAM_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies 16 bytes from global to shared memory asynchronously. Both addresses are multiples of 16. commit_copies closes a group
// of copies; wait_copies waits for all groups of the calling thread but the newest `but`.
TCAM_DEVICE void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
TCAM_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int but = 0>
TCAM_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(but) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit numbers from shared memory; lane l passes the address of row l % 8 of matrix l / 8.
TCAM_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with each matrix transposed.
TCAM_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Stores four 8 x 8 matrices, the reverse of load_matrices.
TCAM_DEVICE void store_matrices(void* row, const uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
#else
  const uint32_t mine = shared_address(row);
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const uint32_t at = __shfl_sync(0xffffffffu, mine, m * 8 + lane / 4) + lane % 4 * 4;
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(r[m]) : "memory");
  }
#endif
}

// Named barriers for part of a block. Barrier `id` opens when `threads` threads (a multiple of 32) have reached it. A thread
// that waits blocks until then; one that arrives does not. The threads that wait see what all of them wrote before.
TCAM_DEVICE void barrier_wait(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
TCAM_DEVICE void barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// For each 16-bit half of v: all ones where its highest bit is set, else zero.
TCAM_DEVICE uint32_t spread_signs(uint32_t v) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %1, 0xbb99;" : "=r"(r) : "r"(v));
  return r;
}

// Brings the line of an address in global memory to the L2 cache.
TCAM_DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(at))); }

// Hides the value of x from the compiler, which then computes again what it would otherwise keep in registers.
TCAM_DEVICE void forget(int& x) { asm volatile("" : "+r"(x)); }

// Loads two neighbouring numbers from shared memory at once.
TCAM_DEVICE void load_pair(float* r, const float* p) {
  const float2 v = *reinterpret_cast<const float2*>(p);
  r[0] = v.x;
  r[1] = v.y;
}

// to_tensor_float rounds a float to TensorFloat-32: ties to even where that is one instruction, else away from zero.
// mma_tensor_float: D += A B of such numbers, m16n8k8.
TCAM_DEVICE uint32_t to_tensor_float(float x) {
  uint32_t r;
#if __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
#endif
  return r;
}
TCAM_DEVICE void mma_tensor_float(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// word with bits k and k + 16 set where the low and the high half of h are positive or NaN, which goes on into gradients as in
// torch. h has no negative half; the bits were zero.
#if __CUDA_ARCH__ >= 900
#define TCAM_NOTE_POSITIVE(type)                                          \
  uint32_t mask;                                                          \
  asm("set.gtu.u32." type " %0, %1, %2;" : "=r"(mask) : "r"(h), "r"(0u)); \
  return word | (mask & 0x00010001u << k)
#else
#define TCAM_NOTE_POSITIVE(type) return word | ((h + 0x7fff7fffu) >> (15 - k) & 0x00010001u << k)
#endif

#define TCAM_MMA(type)                                                          \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type           \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};" \
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))

// A 16-bit format: arithmetic on pairs (the first number in the low half), rounding, and the tensor-core product D = A B + C,
// m16n8k16, with fragments as the PTX ISA lays them out.
struct BFloat16 {
  static constexpr int dtype = TCAM_BF16;
  static constexpr uint32_t ones = 0x3f803f80u;
  TCAM_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, const float (&c)[4]) {
    TCAM_MMA("bf16");
  }
  TCAM_DEVICE static uint32_t pack(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
  }
  TCAM_DEVICE static uint32_t pack_relu(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
  }
  TCAM_DEVICE static uint32_t add(uint32_t a, uint32_t b) {  // a * 1 + b: sm_80 has no packed add of bfloat16
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %3, %2;" : "=r"(r) : "r"(a), "r"(b), "r"(ones));
    return r;
  }
  TCAM_DEVICE static uint32_t add_relu(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("fma.rn.relu.bf16x2 %0, %1, %3, %2;" : "=r"(r) : "r"(a), "r"(b), "r"(ones));
    return r;
  }
  TCAM_DEVICE static uint32_t note_positive(uint32_t word, uint32_t h, int k) { TCAM_NOTE_POSITIVE("bf16x2"); }
  TCAM_DEVICE static uint16_t round(float x) { return Bits::to_bfloat(x); }
  TCAM_DEVICE static float widen(uint16_t x) { return Bits::bfloat(x); }
};

struct Float16 {
  static constexpr int dtype = TCAM_F16;
  static constexpr uint32_t ones = 0x3c003c00u;
  TCAM_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, const float (&c)[4]) {
    TCAM_MMA("f16");
  }
  TCAM_DEVICE static uint32_t pack(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
  }
  TCAM_DEVICE static uint32_t pack_relu(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
  }
  TCAM_DEVICE static uint32_t add(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("fma.rn.f16x2 %0, %1, %3, %2;" : "=r"(r) : "r"(a), "r"(b), "r"(ones));
    return r;
  }
  TCAM_DEVICE static uint32_t add_relu(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("fma.rn.relu.f16x2 %0, %1, %3, %2;" : "=r"(r) : "r"(a), "r"(b), "r"(ones));
    return r;
  }
  TCAM_DEVICE static uint32_t note_positive(uint32_t word, uint32_t h, int k) { TCAM_NOTE_POSITIVE("f16x2"); }
  TCAM_DEVICE static uint16_t round(float x) {
    uint16_t r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
  }
  TCAM_DEVICE static float widen(uint16_t x) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
    return r;
  }
};
#undef TCAM_MMA
#undef TCAM_NOTE_POSITIVE

}  // namespace ptx
}  // namespace tcam
#endif
