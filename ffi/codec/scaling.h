// What a codec tells the kernels, beside how its bytes become operands.
//
// A codec is a struct with
//   kBits                     per weight
//   kScaling, kGroup          where its scales are; kGroup columns share one where that is kGroup*
//   kStep<V>                  columns that one Decode turns into operands
//   Decode<V>(bytes, out)     kStep<V> columns from `bytes`, without their scales
//   Position<V>(column)       where Decode puts a column of the step; packed activations follow
//   kFactor<V>                a decoded operand times this (a power of two) is the stored number
// in terms of the vocabulary `V` of an ISA (kernels/isa).
#pragma once

namespace hmoe {
namespace {

enum class Scaling {
  kNone,
  kRow,        // one float32 or bfloat16 for a row, or for all rows
  kBlock,      // one float32 for 128 columns of a row, or of 128 rows
  kGroupBf16,  // one bfloat16 for kGroup columns of a row
  kGroupE8M0,  // one power of two for kGroup columns of a row, its exponent + 127 in a byte; 255 is NaN
};

constexpr bool IsGroup(Scaling scaling) {
  return scaling == Scaling::kGroupBf16 || scaling == Scaling::kGroupE8M0;
}

constexpr int BytesOfScale(Scaling scaling) {
  return scaling == Scaling::kGroupE8M0 ? 1 : scaling == Scaling::kGroupBf16 ? 2 : 4;
}

constexpr float FloatFromE8M0(unsigned exponent) {
  // 2^-127 is below the normal numbers, and 255 means NaN: both have the bit below the exponent set.
  const unsigned extra = exponent == 0 || exponent == 255 ? 1u << 22 : 0;
  return __builtin_bit_cast(float, exponent << 23 | extra);
}

}  // namespace
}  // namespace hmoe
