// What happens to every element between the products. Plain loops: each ISA's file compiles them with its own
// vectors, and as every step rounds as IEEE 754 says, all of them give the same bits.
#pragma once

#include <cstdint>

#include "codec/bf16.h"

namespace hmoe {
namespace {

// e^x, within 2 ulp; 0 and infinity where they belong, NaN for NaN. x = n ln 2 + r with |r| <= ln 2 / 2, a
// polynomial for e^r, and 2^n in two factors, either of which is a normal number.
inline float Exp(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves no bits below the point
  const float shifted = x * 0x1.715476p+0f + kRound;
  const float n = shifted - kRound;
  // ln 2 in two parts: n times the first is exact.
  const float r = (x - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;
  float p = 0x1.6c16c2p-10f;   // 1/720
  p = p * r + 0x1.111112p-7f;  // 1/120
  p = p * r + 0x1.555556p-5f;
  p = p * r + 0x1.555556p-3f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const auto exponent =
      static_cast<int32_t>(__builtin_bit_cast(uint32_t, shifted) - __builtin_bit_cast(uint32_t, kRound));
  const int32_t half = exponent >> 1;
  const float first = __builtin_bit_cast(float, static_cast<uint32_t>(half + 127) << 23);
  const float second = __builtin_bit_cast(float, static_cast<uint32_t>(exponent - half + 127) << 23);
  return p * first * second;
}

inline void SwiGlu(const float* gate, const float* up, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = Bf16FromFloat(gate[i] / (1.0f + Exp(-gate[i])) * up[i]);
}

inline void AddScaled(float weight, const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += weight * from[i];
}

}  // namespace
}  // namespace hmoe
