// bfloat16, the upper half of a float; and the codec of that name: weights stored so, without scales.
//
// Like every header that the per-ISA files include: no standard templates, and nothing with external linkage.
// The linker keeps one copy of an inline function, and that might be the one compiled for AVX-512.
#pragma once

#include <cstdint>

#include "codec/scaling.h"

namespace hmoe {
namespace {

constexpr float FloatFromBf16(uint16_t bits) { return __builtin_bit_cast(float, uint32_t{bits} << 16); }

// Rounds to nearest even. A NaN stays a NaN: the rounding term could carry its mantissa into infinity.
constexpr uint16_t Bf16FromFloat(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct Bf16 {
  static constexpr int kBits = 16;
  static constexpr Scaling kScaling = Scaling::kNone;

  template <typename V>
  static constexpr int kStep = V::kStep;

  template <typename V>
  static constexpr float kFactor = 1;

  template <typename V>
  static constexpr int Position(int column) {
    return column;
  }

  template <typename V>
  static inline void Decode(const uint8_t* bytes, typename V::Operand* out) {
    V::LoadBf16(bytes, out);
  }
};

}  // namespace
}  // namespace hmoe
