// Two weights in a byte, the first in the low half: what the four-bit codecs share. A number is one of 16
// values, exact in bfloat16, and a look-up finds it.
#pragma once

#include <cstdint>

#include "codec/bf16.h"

namespace hmoe {
namespace {

struct NibbleTable {
  // Twice, so that an index of five bits may carry a bit of its neighbour.
  alignas(64) float value[16];
  alignas(64) uint16_t bf16[32];

  template <typename ValueOf>
  explicit constexpr NibbleTable(ValueOf value_of) : value(), bf16() {
    for (int i = 0; i < 32; ++i) {
      if (i < 16) value[i] = value_of(i);
      bf16[i] = Bf16FromFloat(value_of(i % 16));
    }
  }
};

struct Nibbles {
  static constexpr int kBits = 4;

  template <typename V>
  static constexpr int kStep = V::kNibbleStep;

  template <typename V>
  static constexpr float kFactor = 1;

  template <typename V>
  static constexpr int Position(int column) {
    return V::NibblePosition(column);
  }
};

}  // namespace
}  // namespace hmoe
