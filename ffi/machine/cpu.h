// What this processor and this operating system can run together.
#pragma once

#include <cstdint>
#include <string>

namespace hmoe {

struct CpuFeatures {
  bool avx2 = false;         // AVX2, FMA and F16C
  bool avx512 = false;       // F, BW, VL and DQ
  bool avx512_bf16 = false;  // the above, VBMI, GFNI and BF16
  bool amx_bf16 = false;     // the above, and tiles that the kernel knows of
};

CpuFeatures DetectCpu();

// Tile data is 8 KB that a thread's saved state has only after the process asked for it. Refused where a
// thread has a signal stack that is too small for it.
bool AskForTiles();

// Of one core; 1 MB where the system does not say.
int64_t SecondCacheBytes();

// The processor's name for people ("unknown processor" where it has none).
std::string CpuName();

}  // namespace hmoe
