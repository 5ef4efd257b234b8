// E2M1 with a power of two per 32 columns (OCP Microscaling MXFP4; gpt-oss).
#pragma once

#include "codec/nibbles.h"

namespace hmoe {
namespace {

constexpr float FloatFromE2M1(int bits) {
  constexpr float kMagnitudes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  return bits & 8 ? -kMagnitudes[bits & 7] : kMagnitudes[bits & 7];
}

constexpr NibbleTable kE2M1Table(FloatFromE2M1);

struct Mxfp4 : Nibbles {
  static constexpr Scaling kScaling = Scaling::kGroupE8M0;
  static constexpr int kGroup = 32;
  static constexpr const NibbleTable& kTable = kE2M1Table;

  template <typename V>
  static inline void Decode(const uint8_t* bytes, typename V::Operand* out) {
    V::LookUpNibbles(kTable, bytes, out);
  }
};

}  // namespace
}  // namespace hmoe
