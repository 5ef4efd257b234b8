#include "codec/codec.h"

#include <cmath>
#include <limits>

#include "codec/fp8_block.h"
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

void TestNamesAndSizes() {
  CHECK_EQ(FindCodec("fp8_block").value().WeightBytes(3, 5), 15);
  CHECK_EQ(FindCodec("fp8_block").value().NumScales(129, 256), 4);
  CHECK_EQ(FindCodec("bf16").value().WeightBytes(3, 5), 30);
  CHECK_EQ(FindCodec("bf16").value().NumScales(129, 256), 0);
  CHECK_CONTAINS(FindCodec("fp7").error().message, "codec 'fp7' is unknown: expected one of bf16, fp8_block");
}

}  // namespace
}  // namespace hmoe

int main() {
  hmoe::TestE4M3IsItsDefinition();
  hmoe::TestBf16KeepsItsOwnValues();
  hmoe::TestRoundingIsToTheNearestAndTiesToEven();
  hmoe::TestNamesAndSizes();
  return hmoe::test::failures;
}
