// AVX-512 with BF16: one instruction multiplies and adds sixteen pairs.
#pragma once

#include "kernels/mla/avx512.h"

namespace hmoe {
namespace {

struct Avx512Bf16 : Avx512 {
  static Acc MultiplyAdd(Pairs a, Pairs b, Acc sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static void StoreBf16(Acc x, uint16_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
  }
  static void StoreRounded(Acc even, Acc odd, uint16_t* to, int64_t stride) {
    // Sixteen of `even`, then sixteen of `odd`, in order: word i and word 16 + i become pair i.
    const auto halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
    ScatterPairs(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)), to, stride);
  }
};

}  // namespace
}  // namespace hmoe
