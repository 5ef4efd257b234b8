// What this processor and this operating system can run together.
#pragma once

#include <string>

namespace hmoe {

struct CpuFeatures {
  bool avx2 = false;         // AVX2, FMA and F16C
  bool avx512 = false;       // F, BW, VL and DQ
  bool avx512_bf16 = false;  // the above, VBMI and BF16
  bool amx = false;          // the above, and tiles of BF16 that the system lets this process use
};

CpuFeatures DetectCpu();

// The processor's name for people ("unknown processor" where it has none).
std::string CpuName();

}  // namespace hmoe
