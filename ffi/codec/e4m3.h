// E4M3FN numbers, one byte each, however they are scaled.
//
// An encoding is sign, 4 bits of exponent (bias 7), 3 bits of mantissa. Exponent 0 is subnormal. There is no
// infinity: 0x7f and 0xff are the only NaNs, and a NaN in a checkpoint must stay visible, so no route below
// may turn it into 480. Every value is exact in bfloat16.
#pragma once

#include <cstdint>

#include "codec/bf16.h"

namespace hmoe {
namespace {

constexpr float FloatFromE4M3(uint8_t bits) {
  const uint32_t exponent = (bits >> 3) & 15, mantissa = bits & 7, sign = uint32_t{bits & 0x80u} << 24;
  if ((bits & 0x7f) == 0x7f) return __builtin_bit_cast(float, sign | 0x7fc00000);
  if (exponent == 0) {
    const float subnormal = static_cast<float>(mantissa) * 0x1p-9f;
    return sign ? -subnormal : subnormal;
  }
  return __builtin_bit_cast(float, sign | (exponent - 7 + 127) << 23 | mantissa << 20);
}

// The three ways in which an ISA can turn E4M3 into operands.
enum class DecodeWay { kTable, kHalf, kBytes };

struct E4M3Values {
  float value[256];
  constexpr E4M3Values() : value() {
    for (int i = 0; i < 256; ++i) value[i] = FloatFromE4M3(static_cast<uint8_t>(i));
  }
};

// The bfloat16 of the 128 encodings without sign, split into bytes, for machines that look bytes up.
struct E4M3Bytes {
  alignas(64) uint8_t low[128], high[128];
  constexpr E4M3Bytes() : low(), high() {
    for (int i = 0; i < 128; ++i) {
      const uint16_t bits = Bf16FromFloat(FloatFromE4M3(static_cast<uint8_t>(i)));
      low[i] = static_cast<uint8_t>(bits);
      high[i] = static_cast<uint8_t>(bits >> 8);
    }
  }
};

constexpr E4M3Values kE4M3Values;
constexpr E4M3Bytes kE4M3Bytes;

// Bit i of a result is the parity of the encoding's bits under byte 7 - i (what `gf2p8affineqb` takes).
// Low: mantissa and lowest exponent bit, moved up by four. High: sign, then exponent bits 3; 3, 3, 3, 3
// (flipped); 2; 1.
constexpr uint64_t kLowByte = 0x0000000001020408, kHighByte = 0x1020404040404080;

struct E4M3 {
  static constexpr int kBits = 8;

  template <typename V>
  static constexpr int kStep = V::kStep;

  // The half route leaves out a power of two, which is exact to put back in the scale.
  template <typename V>
  static constexpr float kFactor = V::kWay == DecodeWay::kHalf ? 256.0f : 1.0f;

  // Interleaving the low and high bytes leaves the columns of a step in another order; activations follow it.
  template <typename V>
  static constexpr int Position(int column) {
    if constexpr (V::kWay == DecodeWay::kBytes) return V::InterleavedPosition(column);
    return column;
  }

  // Ordinary are all encodings but those of zero, subnormals and NaN: an encoding whose value here is at most
  // kMostUsual. (Doubled, it loses the sign.)
  static constexpr int kMostUsual = 252 - 16;
  template <typename V>
  static inline typename V::Bytes Unusual(typename V::Bytes encoded) {
    return V::AddBytes(V::AddBytes(encoded, encoded), V::EveryByte(-16));
  }

  // The bytes of the bfloat16 are affine over bits. Its exponent is greater by 120: to e of four bits that
  // adds 0111 1 before the highest bit, or flips those where it is set.
  template <typename V>
  static inline void DecodeOrdinary(typename V::Bytes encoded, typename V::Operand* out) {
    V::Interleave(V::template Affine<0>(encoded, kLowByte), V::template Affine<0x3c>(encoded, kHighByte),
                  out);
  }

  // The look-up indexes with the low 7 bits and so ignores the sign, which the high byte takes over.
  template <typename V>
  static inline void DecodeAny(typename V::Bytes encoded, typename V::Operand* out) {
    const auto low = V::LookUp(kE4M3Bytes.low, encoded);
    const auto high = V::CopyBits(V::LookUp(kE4M3Bytes.high, encoded), encoded, 0x80);
    V::Interleave(low, high, out);
  }

  template <typename V>
  static inline void Decode(const uint8_t* bytes, typename V::Operand* out) {
    if constexpr (V::kWay == DecodeWay::kBytes) {
      const auto encoded = V::LoadBytes(bytes);
      if (__builtin_expect(V::AllAtMost(Unusual<V>(encoded), kMostUsual), 1)) {
        DecodeOrdinary<V>(encoded, out);
      } else {
        DecodeAny<V>(encoded, out);
      }
    } else if constexpr (V::kWay == DecodeWay::kHalf) {
      // Moved to the exponent's place of an IEEE half (bias 15) the same bits mean 2^-8 of the weight,
      // subnormals included. Only the NaN needs help: exponent 15 is ordinary in a half, 31 is not.
      const auto encoded = V::WidenBytes(bytes);
      const auto magnitude = V::template ShiftLeft<7>(V::And(encoded, 0x7f));
      const auto sign = V::template ShiftLeft<8>(V::And(encoded, 0x80));
      const auto nan = V::And(V::Equal(magnitude, 0x7f << 7), 0x4000);
      V::HalvesToFloats(V::Or(V::Or(magnitude, sign), nan), out);
    } else {
      V::LookUpBytes(kE4M3Values.value, bytes, out);
    }
  }
};

}  // namespace
}  // namespace hmoe
