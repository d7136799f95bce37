// Conversions of the 16-bit floating-point formats by integer arithmetic, shared by host and device. They round to nearest even
// and keep NaN.
#pragma once
#include <stdint.h>
#include <string.h>

#include "../problem.h"
#include "activation.h"

namespace tcam {

struct Bits {
  TCAM_MATHS uint32_t of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
  }
  TCAM_MATHS float value(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
  }

  TCAM_MATHS float half(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, e = (h >> 10) & 31, m = h & 1023;
    if (e == 31) return value(sign | 0x7f800000u | (m << 13));
    if (e) return value(sign | ((e + 112) << 23) | (m << 13));
    return value(sign | of(static_cast<float>(m) * 5.9604644775390625e-8f));  // 2^-24
  }
  TCAM_MATHS uint16_t to_half(float x) {
    uint32_t u = of(x);
    const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
    if (u >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
    if (u < 0x38800000u)  // subnormal, in units of 2^-24; the sum rounds to even
      return static_cast<uint16_t>(sign | (of(value(u) + 0.5f) - 0x3f000000u));
    u += 0xfff + ((u >> 13) & 1);
    return static_cast<uint16_t>(sign | ((u - 0x38000000u) >> 13));
  }

  TCAM_MATHS float bfloat(uint16_t h) { return value(static_cast<uint32_t>(h) << 16); }
  TCAM_MATHS uint16_t to_bfloat(float x) {
    const uint32_t u = of(x);
    if (x != x) return static_cast<uint16_t>((u >> 16) | 0x40);
    return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
};

TCAM_MATHS constexpr int dtype_bytes(int dtype) {
  return dtype == TCAM_F64 ? 8 : dtype == TCAM_F32 ? 4 : dtype == TCAM_U8 ? 1 : 2;
}

// Access to element `index` of an array of any dtype of problem.h.
template <class Real>
struct Elements {
  TCAM_MATHS void write(void* data, int dtype, long long index, Real x) {
    switch (dtype) {
      case TCAM_F32: static_cast<float*>(data)[index] = static_cast<float>(x); break;
      case TCAM_F64: static_cast<double*>(data)[index] = static_cast<double>(x); break;
      case TCAM_F16: static_cast<uint16_t*>(data)[index] = Bits::to_half(static_cast<float>(x)); break;
      case TCAM_BF16: static_cast<uint16_t*>(data)[index] = Bits::to_bfloat(static_cast<float>(x)); break;
    }
  }
  TCAM_MATHS Real read(const void* data, int dtype, long long index) {
    switch (dtype) {
      case TCAM_F32: return static_cast<Real>(static_cast<const float*>(data)[index]);
      case TCAM_F64: return static_cast<Real>(static_cast<const double*>(data)[index]);
      case TCAM_F16: return static_cast<Real>(Bits::half(static_cast<const uint16_t*>(data)[index]));
      case TCAM_U8: return static_cast<Real>(static_cast<const uint8_t*>(data)[index]) / 255;
      default: return static_cast<Real>(Bits::bfloat(static_cast<const uint16_t*>(data)[index]));
    }
  }

  // read() in two steps: load() issues the load, and value() converts it when it is needed. A double is loaded as a float.
  TCAM_MATHS uint32_t load(const void* data, int dtype, long long index) {
    switch (dtype) {
      case TCAM_F32: return static_cast<const uint32_t*>(data)[index];
      case TCAM_F64: return Bits::of(static_cast<float>(static_cast<const double*>(data)[index]));
      case TCAM_U8: return static_cast<const uint8_t*>(data)[index];
      default: return static_cast<const uint16_t*>(data)[index];
    }
  }
  TCAM_MATHS Real value(uint32_t loaded, int dtype) {
    switch (dtype) {
      case TCAM_F16: return static_cast<Real>(Bits::half(static_cast<uint16_t>(loaded)));
      case TCAM_BF16: return static_cast<Real>(Bits::bfloat(static_cast<uint16_t>(loaded)));
      case TCAM_U8: return static_cast<Real>(loaded) / 255;
      default: return static_cast<Real>(Bits::value(loaded));
    }
  }
};

}  // namespace tcam
