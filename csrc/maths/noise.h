// Normal noise, shared by host and device: Philox4x32-10 (Salmon, Moraes, Dror and Shaw: Parallel random numbers: as easy as 1,
// 2, 3; SC 2011), then the Box-Muller transform.
//
// The bits are the same on every machine. The only library functions are fma and sqrt, which IEEE 754 rounds uniquely, and
// every product that is added to something is inside an fma, so the compiler has nothing to contract. `M` supplies the
// arithmetic of lanes: V float32, U uint32, I int32.
#pragma once
#include <stdint.h>

#include "activation.h"

namespace tcam {

// The purpose of the normals. Stream 0 is the noise of features, with `number` the voxel in the whole grid or the point of its
// object. Stream 1 + q is the noise of the texels of plane q, with number 0.
struct NoiseKey {
  uint64_t seed, number;
  uint32_t object, sequence;  // object < 2^27, sequence < 2^5
};

template <class M>
struct Noise {
  using V = typename M::V;
  using U = typename M::U;
  using I = typename M::I;

  TCAM_MATHS void philox(U (&c)[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
      U hi0, lo0, hi1, lo1;
      M::multiply(c[0], 0xD2511F53u, hi0, lo0);
      M::multiply(c[2], 0xCD9E8D57u, hi1, lo1);
      c[0] = hi1 ^ c[1] ^ k0, c[1] = lo1;
      c[2] = hi0 ^ c[3] ^ k1, c[3] = lo0;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
  }

  // sqrt(-2 ln u) for u = (floor(x/2) + 1/2)/2^31. u is split into 2^k m with m in [sqrt(1/2), sqrt(2)), and a polynomial gives
  // -2 ln(m)/(m - 1) (relative error 1.7e-7).
  TCAM_MATHS V radius(U x) {
    const V u = (M::to_float((I)(x >> 1)) + M::splat(0.5f)) * M::splat(0x1p-31f);
    const I shifted = (I)(M::bits(u) - 0x3f3504f3u);  // sqrt(1/2)
    const V t = M::floats((U)(shifted & 0x007fffff) + 0x3f3504f3u) - M::splat(1.f);
    V p = M::splat(0.20213529f);
    p = M::fma(p, t, M::splat(-0.32445049f));
    p = M::fma(p, t, M::splat(0.34501696f));
    p = M::fma(p, t, M::splat(-0.39800346f));
    p = M::fma(p, t, M::splat(0.49939817f));
    p = M::fma(p, t, M::splat(-0.66670117f));
    p = M::fma(p, t, M::splat(1.0000073f));
    p = M::fma(p, t, M::splat(-1.9999999f));
    return M::sqrt(M::fma(M::to_float(shifted >> 23), M::splat(-1.3862944f), p * t));
  }

  // Two normals from two words. The second word is an angle: its first two bits count quarter turns, and the rest is a further
  // angle of a quarter turns, a in [-1/2, 1/2). Polynomials in a^2 give its sin and cos (errors 3e-9 and 3e-8).
  TCAM_MATHS void normals(U x, U y, V& first, V& second) {
    const V a = M::to_float((I)(y << 2)) * M::splat(0x1p-32f), a2 = a * a;
    V s = M::splat(-0.0046016616f);
    s = M::fma(s, a2, M::splat(0.07968003f));
    s = M::fma(s, a2, M::splat(-0.64596346f));
    s = M::fma(s, a2, M::splat(1.5707963f));
    s = s * a;
    V c = M::splat(-0.020398580f);
    c = M::fma(c, a2, M::splat(0.25359495f));
    c = M::fma(c, a2, M::splat(-1.2336967f));
    c = M::fma(c, a2, M::splat(1.f));
    const U quarter = y >> 30;
    const V r = radius(x);
    const V cosine = M::select((I)(quarter & 1u), s, c), sine = M::select((I)(quarter & 1u), c, s);
    first = r * M::floats(M::bits(cosine) ^ (((quarter + 1u) & 2u) << 30));
    second = r * M::floats(M::bits(sine) ^ ((quarter & 2u) << 30));
  }

  // The four normals of Philox block `block` of a key.
  TCAM_MATHS void block(const NoiseKey& key, U block, V (&out)[4]) {
    U c[4] = {M::splat((uint32_t)key.number), M::splat((uint32_t)(key.number >> 32)), M::splat(key.object | key.sequence << 27),
              block};
    philox(c, (uint32_t)key.seed, (uint32_t)(key.seed >> 32));
    normals(c[0], c[1], out[0], out[1]);
    normals(c[2], c[3], out[2], out[3]);
  }
};

// The Philox blocks of n normals. Normal f is word f / blocks of block f % blocks, so neighbours come from neighbouring lanes.
TCAM_MATHS int64_t noise_blocks(int64_t n) { return (n + 3) / 4; }

}  // namespace tcam
