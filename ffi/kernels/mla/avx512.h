// AVX-512 vocabulary of latent attention, shared by the tiers that add to it.
#pragma once

#include <immintrin.h>

#include "kernels/mla/kernels.h"

namespace hmoe {
namespace {

struct Avx512 {
  using Acc = __m512;
  using Pairs = __m512i;

  static Acc Zero() { return _mm512_setzero_ps(); }
  static Acc Set1(float x) { return _mm512_set1_ps(x); }
  static Acc Load(const float* from) { return _mm512_loadu_ps(from); }
  static void Store(float* to, Acc x) { _mm512_storeu_ps(to, x); }
  static Acc Add(Acc a, Acc b) { return _mm512_add_ps(a, b); }
  static Acc Sub(Acc a, Acc b) { return _mm512_sub_ps(a, b); }
  static Acc Mul(Acc a, Acc b) { return _mm512_mul_ps(a, b); }
  static Acc Max(Acc a, Acc b) { return _mm512_max_ps(a, b); }
  static Acc Round(Acc a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Acc MultiplyAddFloats(Acc a, Acc b, Acc sum) { return _mm512_fmadd_ps(a, b, sum); }
  static Acc TimesPowerOf2(Acc a, Acc n) { return _mm512_scalef_ps(a, n); }
  static float Sum(Acc a) { return _mm512_reduce_add_ps(a); }

  static Pairs LoadPairs(const uint16_t* from) { return _mm512_loadu_si512(from); }
  static Pairs BroadcastPair(uint32_t pair) { return _mm512_set1_epi32(static_cast<int>(pair)); }
  static Acc MultiplyAdd(Pairs a, Pairs b, Acc sum) {
    return _mm512_fmadd_ps(Odd(a), Odd(b), _mm512_fmadd_ps(Even(a), Even(b), sum));
  }

  static void ZipRows(const uint16_t* even, const uint16_t* odd, uint16_t* to) {
    _mm512_storeu_si512(to, _mm512_or_si512(Widen(even), _mm512_slli_epi32(Widen(odd), 16)));
  }
  static void StoreBf16(Acc x, uint16_t* to) {
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(Rounded(x), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
  }
  static void StoreRounded(Acc even, Acc odd, uint16_t* to, int64_t stride) {
    const __m512i high = _mm512_maskz_mov_epi16(0xaaaaaaaa, Rounded(odd));
    ScatterPairs(_mm512_or_si512(_mm512_srli_epi32(Rounded(even), 16), high), to, stride);
  }

 protected:
  static void ScatterPairs(__m512i pairs, uint16_t* to, int64_t stride) {
    if (stride == 2) {
      _mm512_storeu_si512(to, pairs);
      return;
    }
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(stride)));
    _mm512_i32scatter_epi32(to, places, pairs, sizeof(uint16_t));
  }

 private:
  static __m512 Even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static __m512 Odd(__m512i pairs) { return _mm512_castsi512_ps(_mm512_maskz_mov_epi16(0xaaaaaaaa, pairs)); }
  static __m512i Widen(const uint16_t* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  // To nearest, ties to even; NaN keeps its high bits, the quiet one set.
  static __m512i Rounded(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(up, is_nan, bits, _mm512_set1_epi32(0x00400000));
  }
};

}  // namespace
}  // namespace hmoe
