// AVX-512 with VBMI, GFNI and BF16.

#include "kernels/isa/avx512_bf16.h"

#include "kernels/isa/dot_peak.h"
#include "kernels/vector_projection.h"

namespace hmoe {
namespace {

struct Vocabulary : Avx512Bf16 {
  using Dot = DotBf16;
  static uint64_t Read(const uint8_t* memory, int64_t bytes) { return kAvx512Kernels.read(memory, bytes); }
};

}  // namespace

constinit const IsaKernels kAvx512Bf16Kernels = VectorKernels<Vocabulary>::Make();

}  // namespace hmoe
