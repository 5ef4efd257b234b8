// E4M3 with one scale per output channel, or one for the whole tensor (compressed-tensors' float-quantized).
#pragma once

#include "codec/e4m3.h"
#include "codec/scaling.h"

namespace hmoe {
namespace {

struct Fp8Channel : E4M3 {
  static constexpr Scaling kScaling = Scaling::kRow;
};

}  // namespace
}  // namespace hmoe
