#include "kernels/mla/table.h"

namespace hmoe {

const MlaKernels& MlaKernelsOf(std::string_view isa_name) {
#if defined(__x86_64__)
  if (isa_name == "amx") return kAmxMla;
  if (isa_name == "avx512_bf16") return kAvx512Bf16Mla;
  if (isa_name == "avx512") return kAvx512Mla;
  if (isa_name == "avx2") return kAvx2Mla;
#endif
  return kScalarMla;
}

}  // namespace hmoe
