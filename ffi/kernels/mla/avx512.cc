// AVX-512 without BF16: pairs are widened into two multiply-adds.

#include "kernels/mla/avx512.h"

namespace hmoe {

constinit const MlaKernels kAvx512Mla = MakeMla<Avx512>();

}  // namespace hmoe
