// Symmetric int8 with one scale per output channel, or one for the whole tensor. Every value is exact in
// bfloat16.
#pragma once

#include <cstdint>

#include "codec/scaling.h"

namespace hmoe {
namespace {

struct Int8Channel {
  static constexpr int kBits = 8;
  static constexpr Scaling kScaling = Scaling::kRow;

  template <typename V>
  static constexpr int kStep = V::kStep;

  template <typename V>
  static constexpr float kFactor = 1;

  template <typename V>
  static constexpr int Position(int column) {
    return V::Int8Position(column);
  }

  template <typename V>
  static inline void Decode(const uint8_t* bytes, typename V::Operand* out) {
    V::FromInt8(bytes, out);
  }
};

}  // namespace
}  // namespace hmoe
