// Symmetric int4 with one bfloat16 scale per group of columns (compressed-tensors' pack-quantized). Eight
// numbers lie in a 32-bit word, the first in its low bits, each stored as itself plus 8.
#pragma once

#include "codec/nibbles.h"

namespace hmoe {
namespace {

constexpr NibbleTable kInt4Table([](int bits) { return static_cast<float>(bits - 8); });

template <int kColumns>
struct Int4Group : Nibbles {
  static constexpr Scaling kScaling = Scaling::kGroupBf16;
  static constexpr int kGroup = kColumns;
  static constexpr const NibbleTable& kTable = kInt4Table;

  template <typename V>
  static inline void Decode(const uint8_t* bytes, typename V::Operand* out) {
    V::LookUpNibbles(kTable, bytes, out);
  }
};

}  // namespace
}  // namespace hmoe
