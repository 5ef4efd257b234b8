// E4M3 with one float scale per block of 128 rows x 128 columns (DeepSeek-V3's format), or of 1 x 128.
#pragma once

#include "codec/e4m3.h"
#include "codec/scaling.h"

namespace hmoe {
namespace {

struct Fp8Block : E4M3 {
  static constexpr Scaling kScaling = Scaling::kBlock;
};

}  // namespace
}  // namespace hmoe
