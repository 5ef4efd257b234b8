#include "codec/codec.h"

#include <cmath>
#include <limits>
#include <vector>

#include "codec/e4m3.h"
#include "codec/int4_group.h"
#include "codec/mxfp4.h"
#include "tests/check.h"

namespace hmoe {
namespace {

uint32_t BitsOf(float value) { return __builtin_bit_cast(uint32_t, value); }

void TestE4M3IsItsDefinition() {
  for (int code = 0; code < 256; ++code) {
    const float value = FloatFromE4M3(static_cast<uint8_t>(code));
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    CHECK_EQ(std::signbit(value), code >= 128);
    if ((code & 127) == 127) {
      CHECK(std::isnan(value));
      continue;
    }
    const double magnitude =
        exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    CHECK_EQ(std::fabs(value), magnitude);
    CHECK_EQ(BitsOf(FloatFromBf16(Bf16FromFloat(value))), BitsOf(value));
  }
}

void TestBf16KeepsItsOwnValues() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto original = static_cast<uint16_t>(bits);
    const float value = FloatFromBf16(original);
    if (std::isnan(value)) {
      CHECK(std::isnan(FloatFromBf16(Bf16FromFloat(value))));
    } else {
      CHECK_EQ(Bf16FromFloat(value), original);
    }
  }
}

void TestRoundingIsToTheNearestAndTiesToEven() {
  for (uint32_t bits = 0; bits < 0x7f7f; ++bits) {  // up to the largest finite pair
    const uint32_t low = bits << 16, even = bits % 2 == 0 ? bits : bits + 1;
    CHECK_EQ(Bf16FromFloat(__builtin_bit_cast(float, low + 0x7fff)), bits);
    CHECK_EQ(Bf16FromFloat(__builtin_bit_cast(float, low + 0x8000)), even);
    CHECK_EQ(Bf16FromFloat(__builtin_bit_cast(float, low + 0x8001)), bits + 1);
  }
  CHECK_EQ(Bf16FromFloat(std::numeric_limits<float>::max()), 0x7f80);
  CHECK(std::isnan(FloatFromBf16(Bf16FromFloat(__builtin_bit_cast(float, 0x7fffffffu)))));
  CHECK(std::isnan(FloatFromBf16(Bf16FromFloat(__builtin_bit_cast(float, 0x7f800001u)))));
}

void TestE8M0IsItsDefinition() {
  for (unsigned exponent = 0; exponent < 255; ++exponent) {
    CHECK_EQ(FloatFromE8M0(exponent), std::ldexp(1.0f, static_cast<int>(exponent) - 127));
  }
  CHECK(std::isnan(FloatFromE8M0(255)));
}

void TestNibblesAreTheirDefinitions() {
  for (int bits = 0; bits < 16; ++bits) {
    const int exponent = bits >> 1 & 3, mantissa = bits & 1;
    const double e2m1 = exponent == 0 ? mantissa / 2.0 : std::ldexp(2 + mantissa, exponent - 2);
    CHECK_EQ(FloatFromE2M1(bits), bits & 8 ? -e2m1 : e2m1);
    CHECK_EQ(std::signbit(FloatFromE2M1(bits)), bits >= 8);
    CHECK_EQ(kInt4Table.value[bits], bits - 8);
    for (const NibbleTable* table : {&kInt4Table, &kE2M1Table}) {
      CHECK_EQ(BitsOf(FloatFromBf16(table->bf16[bits])), BitsOf(table->value[bits]));
      CHECK_EQ(table->bf16[bits + 16], table->bf16[bits]);
    }
  }
}

std::string Refusal(const char* codec, int64_t rows, int64_t cols, size_t weights, size_t scales,
                    ScaleType type) {
  const std::vector<uint8_t> bytes(weights), scale_bytes(scales);
  return FindCodec(codec).value().Describe(rows, cols, bytes, scale_bytes, type).error().message;
}

void TestScalesSayWhichRowsShareThem() {
  const auto rows_per_scale = [](const char* codec, size_t weights, size_t scales, ScaleType type) {
    const std::vector<uint8_t> bytes(weights), scale_bytes(scales);
    return FindCodec(codec).value().Describe(200, 256, bytes, scale_bytes, type).value().rows_per_scale;
  };
  CHECK_EQ(rows_per_scale("fp8_block", 51200, 4 * 2 * 2, ScaleType::kFloat32), 128);
  CHECK_EQ(rows_per_scale("fp8_block", 51200, 4 * 200 * 2, ScaleType::kFloat32), 1);
  CHECK_EQ(rows_per_scale("fp8_channel", 51200, 4, ScaleType::kFloat32), 200);
  CHECK_EQ(rows_per_scale("fp8_channel", 51200, 2 * 200, ScaleType::kBf16), 1);
  CHECK_EQ(rows_per_scale("int8_channel", 51200, 4 * 200, ScaleType::kFloat32), 1);
  CHECK_EQ(rows_per_scale("int4_group64", 25600, 2 * 200 * 4, ScaleType::kBf16), 1);
  CHECK_EQ(rows_per_scale("mxfp4", 25600, 200 * 8, ScaleType::kE8M0), 1);
}

void TestWhatDoesNotFitIsSaid() {
  CHECK_EQ(Refusal("fp8_block", 129, 256, 129 * 256, 12, ScaleType::kFloat32),
           "expected 4 or 258 float32 scales for [129, 256] in codec fp8_block, got 12 bytes");
  CHECK_EQ(Refusal("int4_group32", 2, 64, 64, 4, ScaleType::kBf16),
           "expected 4 bfloat16 scales for [2, 64] in codec int4_group32, got 4 bytes");
  CHECK_EQ(Refusal("int4_group128", 2, 64, 64, 4, ScaleType::kBf16),
           "codec int4_group128: expected a multiple of 128 columns, got 64");
  CHECK_EQ(Refusal("int4_group32", 2, 64, 64, 16, ScaleType::kFloat32),
           "codec int4_group32 has no scales of type float32");
  CHECK_EQ(Refusal("mxfp4", 2, 64, 63, 4, ScaleType::kE8M0),
           "expected 64 bytes of weights for [2, 64] in codec mxfp4, got 63");
  CHECK_EQ(Refusal("fp8_channel", 0, 8, 0, 0, ScaleType::kFloat32),
           "expected at least one row and one column, got [0, 8]");
  CHECK_EQ(Refusal("bf16", 8, 0, 0, 0, ScaleType::kFloat32),
           "expected at least one row and one column, got [8, 0]");
  CHECK_EQ(Refusal("bf16", 1, 1, 2, 4, ScaleType::kFloat32), "expected no scales in codec bf16, got 4 bytes");
  CHECK_CONTAINS(FindCodec("fp7").error().message,
                 "codec 'fp7' is unknown: expected one of bf16, fp8_block, fp8_channel");
  CHECK_CONTAINS(FindScaleType("float16").error().message, "scale dtype 'float16' is unknown");
}

}  // namespace
}  // namespace hmoe

int main() {
  hmoe::TestE4M3IsItsDefinition();
  hmoe::TestBf16KeepsItsOwnValues();
  hmoe::TestRoundingIsToTheNearestAndTiesToEven();
  hmoe::TestE8M0IsItsDefinition();
  hmoe::TestNibblesAreTheirDefinitions();
  hmoe::TestScalesSayWhichRowsShareThem();
  hmoe::TestWhatDoesNotFitIsSaid();
  return hmoe::test::failures;
}
