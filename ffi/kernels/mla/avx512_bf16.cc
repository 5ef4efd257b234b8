#include "kernels/mla/avx512_bf16.h"

namespace hmoe {

constinit const MlaKernels kAvx512Bf16Mla = MakeMla<Avx512Bf16>();

}  // namespace hmoe
