// The PTX of wgmma, the asynchronous products of four neighbouring warps (a warpgroup) on sm_90a. The emulator has its own
// version of each function (tests/simt/warpgroup_simt.h). On other architectures the functions are empty, and kernels with them
// must not be launched.
//
// A warpgroup computes D (64, n) += A (64, 16) B (16, n). Warp w has rows 16 w to 16 w + 15 of D and, where A is in registers,
// of A, with fragments like those of mma.sync m16n8k16. B is in shared memory, A there or in registers.
//
// Operands in shared memory are made of rows of 64 16-bit numbers, 128 bytes, whose 16-byte chunk c is stored at
// c ^ (row & 7). They begin at an address divisible by 1024.
#pragma once
#include "ptx.cuh"

#if defined(TCAM_SIMT)
#include "warpgroup_simt.h"
#else

namespace tcam {
namespace ptx {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TCAM_HOPPER(...) asm volatile(__VA_ARGS__)
#else
#define TCAM_HOPPER(...) (void)0
#endif

// Orders the warp's accesses to registers before the products that follow. It precedes the first product, and every product
// after an access to D.
TCAM_DEVICE void warpgroup_fence() { TCAM_HOPPER("wgmma.fence.sync.aligned;" :: : "memory"); }
// Closes a group of products. warpgroup_wait waits for all groups. Until then D must not be read and the operands not be
// changed.
TCAM_DEVICE void warpgroup_commit() { TCAM_HOPPER("wgmma.commit_group.sync.aligned;" :: : "memory"); }
TCAM_DEVICE void warpgroup_wait() { TCAM_HOPPER("wgmma.wait_group.sync.aligned 0;" :: : "memory"); }
// Makes the thread's writes to shared memory visible to products. It stands between the writes and the barrier before them.
TCAM_DEVICE void products_fence() { TCAM_HOPPER("fence.proxy.async.shared::cta;" :: : "memory"); }

// The descriptor of an operand at an address in shared memory. leading: numbers from one block of 64 columns to the next, where
// the operand has several. at(offset) is the operand that begins `offset` numbers later.
struct Operand {
  uint64_t bits;
  TCAM_DEVICE explicit Operand(const uint16_t* rows, int leading = 8) {
    constexpr uint64_t eight_rows = 8 * 128 / 16, swizzle_128 = 1;
    bits = (shared_address(rows) & 0x3ffff) >> 4 | static_cast<uint64_t>(leading * 2 / 16) << 16 | eight_rows << 32 |
           swizzle_128 << 62;
  }
  TCAM_DEVICE Operand at(int offset) const {
    Operand to = *this;
    to.bits += static_cast<uint32_t>(offset * 2 / 16);
    return to;
  }
};

#define TCAM_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TCAM_D16(i) TCAM_D4(i), TCAM_D4(i + 4), TCAM_D4(i + 8), TCAM_D4(i + 12)
#define TCAM_D32 TCAM_D16(0), TCAM_D16(16)
#define TCAM_D64 TCAM_D32, TCAM_D16(32), TCAM_D16(48)
#define TCAM_LIST_32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define TCAM_LIST_64                                                                                                          \
  TCAM_LIST_32                                                                                                                \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61," \
  "%62,%63"
#define TCAM_WGMMA(n, type) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {"

// D = A B (`first`; d need not have values) or D += A B in the format T, with A in registers and n = 64 or 128. b: a row for
// each of the n columns of B; the product takes columns 16 k_step to 16 k_step + 15 of the rows. Entries 4 q to 4 q + 3 of d
// are the accumulators of mma.sync at columns 8 q of D.
#define TCAM_PRODUCT(type)                                                                          \
  if constexpr (n == 64)                                                                            \
    TCAM_HOPPER("{.reg .pred adds; setp.ne.b32 adds, %37, 0; " TCAM_WGMMA("64", type) TCAM_LIST_32  \
                "}, {%32,%33,%34,%35}, %36, adds, 1, 1, 0;}" : TCAM_D32 : TCAM_A);                  \
  else                                                                                              \
    TCAM_HOPPER("{.reg .pred adds; setp.ne.b32 adds, %69, 0; " TCAM_WGMMA("128", type) TCAM_LIST_64 \
                "}, {%64,%65,%66,%67}, %68, adds, 1, 1, 0;}" : TCAM_D64 : TCAM_A)
#define TCAM_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(from.bits), "n"(first ? 0 : 1)
template <class T, bool first, int accumulators>
TCAM_DEVICE void warpgroup_product(float (&d)[accumulators], const uint32_t (&a)[4], const Operand& b, int k_step) {
  constexpr int n = 2 * accumulators;
  const Operand from = b.at(k_step * 16);
  if constexpr (T::dtype == TCAM_BF16) {
    TCAM_PRODUCT("bf16");
  } else {
    TCAM_PRODUCT("f16");
  }
  (void)from;
}
#undef TCAM_PRODUCT
#undef TCAM_A

// D += A^T B for two operands whose rows are the 16 values of k: a (16, 64) and b, n / 64 blocks of (16, 64).
#define TCAM_PRODUCT(type)                                                                                                \
  if constexpr (n == 64)                                                                                                  \
    TCAM_HOPPER(TCAM_WGMMA("64", type) TCAM_LIST_32 "}, %32, %33, 1, 1, 1, 1, 1;" : TCAM_D32 : "l"(a.bits), "l"(b.bits)); \
  else                                                                                                                    \
    TCAM_HOPPER(TCAM_WGMMA("128", type) TCAM_LIST_64 "}, %64, %65, 1, 1, 1, 1, 1;" : TCAM_D64 : "l"(a.bits), "l"(b.bits))
template <class T, int accumulators>
TCAM_DEVICE void warpgroup_outer_product(float (&d)[accumulators], const Operand& a, const Operand& b) {
  constexpr int n = 2 * accumulators;
  if constexpr (T::dtype == TCAM_BF16) {
    TCAM_PRODUCT("bf16");
  } else {
    TCAM_PRODUCT("f16");
  }
  (void)a, (void)b;
}
#undef TCAM_PRODUCT
#undef TCAM_WGMMA
#undef TCAM_D64
#undef TCAM_D32
#undef TCAM_D16
#undef TCAM_D4
#undef TCAM_LIST_64
#undef TCAM_LIST_32
#undef TCAM_HOPPER

}  // namespace ptx
}  // namespace tcam
#endif
