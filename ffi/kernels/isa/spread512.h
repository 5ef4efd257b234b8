// What the ISAs with 512-bit registers share: accumulators of sixteen floats, and scales for their lanes.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace hmoe {
namespace {

struct Spread512 {
  using Acc = __m512;

  static Acc Zero() { return _mm512_setzero_ps(); }
  static Acc Broadcast(float value) { return _mm512_set1_ps(value); }
  static Acc MultiplyAddFloats(Acc a, Acc b, Acc sum) { return _mm512_fmadd_ps(a, b, sum); }
  static Acc Add(Acc a, Acc sum) { return _mm512_add_ps(sum, a); }
  static float Sum(Acc acc) { return _mm512_reduce_add_ps(acc); }

  // kCount (1, 2 or 4) scales, each over its share of the lanes.
  template <int kCount>
  static Acc SpreadBf16(const uint8_t* bytes) {
    const __m128i words = _mm_cvtepu16_epi32(LoadFew<2 * kCount>(bytes));
    return Spread<kCount>(_mm_slli_epi32(words, 16));
  }
  template <int kCount>
  static Acc SpreadE8M0(const uint8_t* bytes) {
    const __m128i exponents = _mm_cvtepu8_epi32(LoadFew<kCount>(bytes));
    // 2^-127 is below the normal numbers, and 255 means NaN: both have the bit below the exponent set.
    const __mmask8 special = _mm_cmpeq_epi32_mask(exponents, _mm_setzero_si128()) |
                             _mm_cmpeq_epi32_mask(exponents, _mm_set1_epi32(255));
    const __m128i bits = _mm_slli_epi32(exponents, 23);
    return Spread<kCount>(_mm_mask_or_epi32(bits, special, bits, _mm_set1_epi32(1 << 22)));
  }

 private:
  template <int kBytes>
  static __m128i LoadFew(const uint8_t* bytes) {
    uint64_t few = 0;
    __builtin_memcpy(&few, bytes, kBytes);
    return _mm_cvtsi64_si128(static_cast<long long>(few));
  }

  template <int kCount>
  static Acc Spread(__m128i scales) {
    if constexpr (kCount == 1) return _mm512_broadcastss_ps(_mm_castsi128_ps(scales));
    constexpr int kLow = kCount == 4 ? 1 : 0, kHigh = kCount == 4 ? 3 : 1, kMiddle = kCount == 4 ? 2 : 1;
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, kLow, kLow, kLow, kLow, kMiddle, kMiddle, kMiddle,
                                            kMiddle, kHigh, kHigh, kHigh, kHigh);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi32(lanes, _mm512_castsi128_si512(scales)));
  }
};

}  // namespace
}  // namespace hmoe
