// The weight formats by name, as Python and the store speak of them.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "base/result.h"
#include "kernels/matrix.h"

namespace hmoe {

// Columns that every kernel takes at once; also the edge of a block of fp8_block.
inline constexpr int64_t kBlock = 128;

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

enum class CodecId {
  kBf16,
  kFp8Block,
  kFp8Channel,
  kInt8Channel,
  kInt4Group32,
  kInt4Group64,
  kInt4Group128,
  kMxfp4
};
inline constexpr int kNumCodecs = 8;

enum class ScaleType { kFloat32, kBf16, kE8M0 };
Result<ScaleType> FindScaleType(std::string_view name);

struct Codec {
  CodecId id;
  const char* name;
  int64_t bits_per_weight;
  int64_t columns_per_scale;  // kNoScales, kWholeRow, or the columns of a group
  int64_t column_multiple;    // a row has a multiple of so many columns

  static constexpr int64_t kNoScales = 0, kWholeRow = -1;

  int64_t WeightBytes(int64_t rows, int64_t cols) const { return rows * cols * bits_per_weight / 8; }
  // Of weights and scales, with scales as many and as wide as they can be.
  int64_t MostBytes(int64_t rows, int64_t cols) const;
  bool has_scales() const { return columns_per_scale != kNoScales; }

  // The matrix that these bytes are. Fails with what was expected where they are too many or too few, the
  // scales have a type that this format does not use, or its columns do not divide. Which rows share a scale
  // follows from the number of scales.
  Result<Matrix> Describe(int64_t rows, int64_t cols, std::span<const uint8_t> weights,
                          std::span<const uint8_t> scales, ScaleType scale_type) const;

  int64_t ScalesPerRow(int64_t cols) const;
};

Result<Codec> FindCodec(std::string_view name);
std::span<const Codec> AllCodecs();

}  // namespace hmoe
