#include "codec/codec.h"

#include <array>
#include <string>

namespace hmoe {
namespace {

constexpr Codec kCodecs[kNumCodecs] = {
    {CodecId::kBf16, "bf16", 16, Codec::kNoScales, 1},
    {CodecId::kFp8Block, "fp8_block", 8, kBlock, 1},
    {CodecId::kFp8Channel, "fp8_channel", 8, Codec::kWholeRow, 1},
    {CodecId::kInt8Channel, "int8_channel", 8, Codec::kWholeRow, 1},
    {CodecId::kInt4Group32, "int4_group32", 4, 32, 32},
    {CodecId::kInt4Group64, "int4_group64", 4, 64, 64},
    {CodecId::kInt4Group128, "int4_group128", 4, 128, 128},
    {CodecId::kMxfp4, "mxfp4", 4, 32, 32},
};

struct NamedScaleType {
  const char* name;
  ScaleType type;
  int64_t bytes;
};
constexpr NamedScaleType kScaleTypes[] = {
    {"float32", ScaleType::kFloat32, 4}, {"bfloat16", ScaleType::kBf16, 2}, {"uint8", ScaleType::kE8M0, 1}};

const NamedScaleType& Named(ScaleType type) { return kScaleTypes[static_cast<int>(type)]; }

bool Accepts(const Codec& codec, ScaleType type) {
  switch (codec.id) {
    case CodecId::kBf16:
    case CodecId::kFp8Block:
      return type == ScaleType::kFloat32;
    case CodecId::kFp8Channel:
    case CodecId::kInt8Channel:
      return type == ScaleType::kFloat32 || type == ScaleType::kBf16;
    case CodecId::kInt4Group32:
    case CodecId::kInt4Group64:
    case CodecId::kInt4Group128:
      return type == ScaleType::kBf16;
    case CodecId::kMxfp4:
      return type == ScaleType::kE8M0;
  }
  return false;
}

// How many rows may share a scale, most first.
std::array<int64_t, 2> RowsPerScale(const Codec& codec, int64_t rows) {
  if (codec.id == CodecId::kFp8Block) return {kBlock, 1};
  if (codec.columns_per_scale == Codec::kWholeRow) return {rows, 1};
  return {1, 1};
}

}  // namespace

std::span<const Codec> AllCodecs() { return kCodecs; }

Result<Codec> FindCodec(std::string_view name) {
  std::string known;
  for (const Codec& codec : kCodecs) {
    if (name == codec.name) return codec;
    known += (known.empty() ? "" : ", ") + std::string(codec.name);
  }
  return Fail("codec '", name, "' is unknown: expected one of ", known);
}

Result<ScaleType> FindScaleType(std::string_view name) {
  for (const NamedScaleType& known : kScaleTypes) {
    if (name == known.name) return known.type;
  }
  return Fail("scale dtype '", name, "' is unknown: expected float32, bfloat16 or uint8");
}

int64_t Codec::ScalesPerRow(int64_t cols) const {
  return has_scales() ? columns_per_scale == kWholeRow ? 1 : CeilDiv(cols, columns_per_scale) : 0;
}

int64_t Codec::MostBytes(int64_t rows, int64_t cols) const {
  return WeightBytes(rows, cols) + rows * ScalesPerRow(cols) * static_cast<int64_t>(sizeof(float));
}

Result<Matrix> Codec::Describe(int64_t rows, int64_t cols, std::span<const uint8_t> weights,
                               std::span<const uint8_t> scales, ScaleType scale_type) const {
  if (rows < 1 || cols < 1)
    return Fail("expected at least one row and one column, got [", rows, ", ", cols, "]");
  if (cols % column_multiple != 0) {
    return Fail("codec ", name, ": expected a multiple of ", column_multiple, " columns, got ", cols);
  }
  if (std::ssize(weights) != WeightBytes(rows, cols)) {
    return Fail("expected ", WeightBytes(rows, cols), " bytes of weights for [", rows, ", ", cols,
                "] in codec ", name, ", got ", weights.size());
  }
  Matrix matrix{weights.data(), nullptr, rows, cols};
  if (!has_scales()) {
    if (scales.empty()) return matrix;
    return Fail("expected no scales in codec ", name, ", got ", scales.size(), " bytes");
  }
  if (!Accepts(*this, scale_type))
    return Fail("codec ", name, " has no scales of type ", Named(scale_type).name);
  matrix.scales = scales.data();
  matrix.scales_are_bf16 = scale_type == ScaleType::kBf16;
  const int64_t per_row = ScalesPerRow(cols);
  const auto [most, fewest] = RowsPerScale(*this, rows);
  for (const int64_t shared : {most, fewest}) {
    matrix.rows_per_scale = shared;
    if (std::ssize(scales) == CeilDiv(rows, shared) * per_row * Named(scale_type).bytes) return matrix;
  }
  return Fail("expected ", CeilDiv(rows, most) * per_row,
              most == fewest ? std::string() : Text(" or ", CeilDiv(rows, fewest) * per_row), " ",
              Named(scale_type).name, " scales for [", rows, ", ", cols, "] in codec ", name, ", got ",
              scales.size(), " bytes");
}

}  // namespace hmoe
