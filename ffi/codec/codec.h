// The weight formats by name, as Python and the store speak of them.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/result.h"

namespace hmoe {

// Scales belong to blocks of this many rows and columns, and sums are made per block of columns (docs:
// numerics).
inline constexpr int64_t kBlock = 128;

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class CodecId { kBf16, kFp8Block };
inline constexpr int kNumCodecs = 2;

struct Codec {
  CodecId id;
  const char* name;
  int64_t bytes_per_weight;
  bool has_scales;

  int64_t WeightBytes(int64_t rows, int64_t cols) const { return rows * cols * bytes_per_weight; }
  int64_t NumScales(int64_t rows, int64_t cols) const {
    return has_scales ? CeilDiv(rows, kBlock) * CeilDiv(cols, kBlock) : 0;
  }
};

Result<Codec> FindCodec(std::string_view name);

}  // namespace hmoe
