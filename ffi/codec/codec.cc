#include "codec/codec.h"

namespace hmoe {
namespace {

constexpr Codec kCodecs[kNumCodecs] = {
    {CodecId::kBf16, "bf16", 2, false},
    {CodecId::kFp8Block, "fp8_block", 1, true},
};

}  // namespace

Result<Codec> FindCodec(std::string_view name) {
  std::string known;
  for (const Codec& codec : kCodecs) {
    if (name == codec.name) return codec;
    known += known.empty() ? codec.name : std::string(", ") + codec.name;
  }
  return Fail("codec '", name, "' is unknown: expected one of ", known);
}

}  // namespace hmoe
