// The PTX of wgmma, the asynchronous products of four neighbouring warps (a warpgroup) on sm_90a. The emulator has its own
// version of each function (tests/simt/warpgroup_simt.h). On other architectures the functions are empty, and kernels with them
// must not be launched.
//
// A warpgroup computes D (64, n) += A (64, 16) B (16, n). Warp w has rows 16 w to 16 w + 15 of A and D, with fragments like
// those of mma.sync m16n8k16, so rows may belong to any voxels. B is in shared memory.
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
TCAM_DEVICE void warpgroup_fence() { TCAM_HOPPER("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of products; warpgroup_wait waits for all groups. Until then D must not be read and A not be changed.
TCAM_DEVICE void warpgroup_commit() { TCAM_HOPPER("wgmma.commit_group.sync.aligned;" ::: "memory"); }
TCAM_DEVICE void warpgroup_wait() { TCAM_HOPPER("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// Makes the thread's writes to shared memory visible to products. It stands between the writes and the barrier before them.
TCAM_DEVICE void products_fence() { TCAM_HOPPER("fence.proxy.async.shared::cta;" ::: "memory"); }

// Moves registers between the warpgroups of a block, whose threads together keep at most 64 Ki. Called by whole warpgroups.
template <int count>
TCAM_DEVICE void take_registers() {
  TCAM_HOPPER("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
TCAM_DEVICE void release_registers() {
  TCAM_HOPPER("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// The descriptor of B: `rows` of n with 64 columns of k each, 128 bytes, whose 16-byte chunk c is stored at c ^ (row & 7), from
// an address divisible by 1024. k_step: which 16 of the 64 columns.
TCAM_DEVICE uint64_t operand_descriptor(const uint16_t* rows, int k_step) {
  const uint64_t at = shared_address(rows) + static_cast<uint32_t>(k_step) * 32;
  constexpr uint64_t eight_rows = 8 * 128 / 16, swizzle_128 = 1;
  return (at & 0x3ffff) >> 4 | 1ull << 16 | eight_rows << 32 | swizzle_128 << 62;
}

#define TCAM_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TCAM_D16(i) TCAM_D4(i), TCAM_D4(i + 4), TCAM_D4(i + 8), TCAM_D4(i + 12)
#define TCAM_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(operand_descriptor(rows, k_step))
#define TCAM_WGMMA_64(type)                                                                                                   \
  TCAM_HOPPER("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                     \
              " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"  \
              "%29,%30,%31}, {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"                                                             \
              : TCAM_D16(0), TCAM_D16(16)                                                                                     \
              : TCAM_A)
#define TCAM_WGMMA_128(type)                                                                                                  \
  TCAM_HOPPER("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                    \
              " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"  \
              "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"  \
              "%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"                                         \
              : TCAM_D16(0), TCAM_D16(16), TCAM_D16(32), TCAM_D16(48)                                                         \
              : TCAM_A)

// D += A B in the format T for n = 64 or 128. Of an accumulator tile of 8 columns, entries 4 q to 4 q + 3 of d are that at
// columns 8 q, as those of mma.sync.
template <class T>
TCAM_DEVICE void warpgroup_product(float (&d)[32], const uint32_t (&a)[4], const uint16_t* rows, int k_step) {
  if constexpr (T::dtype == TCAM_BF16)
    TCAM_WGMMA_64("bf16");
  else
    TCAM_WGMMA_64("f16");
}
template <class T>
TCAM_DEVICE void warpgroup_product(float (&d)[64], const uint32_t (&a)[4], const uint16_t* rows, int k_step) {
  if constexpr (T::dtype == TCAM_BF16)
    TCAM_WGMMA_128("bf16");
  else
    TCAM_WGMMA_128("f16");
}
#undef TCAM_WGMMA_64
#undef TCAM_WGMMA_128
#undef TCAM_A
#undef TCAM_D16
#undef TCAM_D4
#undef TCAM_HOPPER

}  // namespace ptx
}  // namespace tcam
#endif
