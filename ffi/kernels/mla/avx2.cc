// AVX2 with FMA: sixteen floats are two registers.

#include <immintrin.h>

#include "kernels/mla/kernels.h"

namespace hmoe {
namespace {

struct Avx2 {
  struct Acc {
    __m256 low, high;
  };
  struct Pairs {
    __m256i low, high;
  };

  static Acc Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Acc Set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Acc Load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static void Store(float* to, Acc x) {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps(to + 8, x.high);
  }
  static Acc Add(Acc a, Acc b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static Acc Sub(Acc a, Acc b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
  static Acc Mul(Acc a, Acc b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static Acc Max(Acc a, Acc b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  static Acc Round(Acc a) { return {RoundHalf(a.low), RoundHalf(a.high)}; }
  static Acc MultiplyAddFloats(Acc a, Acc b, Acc sum) {
    return {_mm256_fmadd_ps(a.low, b.low, sum.low), _mm256_fmadd_ps(a.high, b.high, sum.high)};
  }
  static Acc TimesPowerOf2(Acc a, Acc n) {
    return {_mm256_mul_ps(a.low, PowerOf2(n.low)), _mm256_mul_ps(a.high, PowerOf2(n.high))};
  }
  static float Sum(Acc a) {
    const __m256 eight = _mm256_add_ps(a.low, a.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static Pairs LoadPairs(const uint16_t* from) {
    const auto* halves = reinterpret_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
  }
  static Pairs BroadcastPair(uint32_t pair) {
    const __m256i all = _mm256_set1_epi32(static_cast<int>(pair));
    return {all, all};
  }
  static Acc MultiplyAdd(Pairs a, Pairs b, Acc sum) {
    return {MultiplyAddHalf(a.low, b.low, sum.low), MultiplyAddHalf(a.high, b.high, sum.high)};
  }

  static void ZipRows(const uint16_t* even, const uint16_t* odd, uint16_t* to) {
    for (int i = 0; i < 2; ++i) {
      const __m256i low = Widen(even + 8 * i), high = _mm256_slli_epi32(Widen(odd + 8 * i), 16);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + i, _mm256_or_si256(low, high));
    }
  }
  static void StoreBf16(Acc x, uint16_t* to) {
    const __m256i low = _mm256_srli_epi32(Rounded(x.low), 16), high = _mm256_srli_epi32(Rounded(x.high), 16);
    const __m256i mixed = _mm256_packus_epi32(low, high);  // quarters of low, high, low, high
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(mixed, 0xd8));
  }
  static void StoreRounded(Acc even, Acc odd, uint16_t* to, int64_t stride) {
    alignas(32) uint32_t pairs[16];
    StorePairs(pairs, even.low, odd.low);
    StorePairs(pairs + 8, even.high, odd.high);
    for (int i = 0; i < 16; ++i) __builtin_memcpy(to + i * stride, pairs + i, sizeof *pairs);
  }

 private:
  static __m256 RoundHalf(__m256 a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static __m256 PowerOf2(__m256 n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static __m256 Even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
  static __m256 Odd(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static __m256 MultiplyAddHalf(__m256i a, __m256i b, __m256 sum) {
    return _mm256_fmadd_ps(Odd(a), Odd(b), _mm256_fmadd_ps(Even(a), Even(b), sum));
  }
  static __m256i Widen(const uint16_t* from) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  // To nearest, ties to even; NaN keeps its high bits, the quiet one set.
  static __m256i Rounded(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(up, quiet, is_nan);
  }
  static void StorePairs(uint32_t* to, __m256 even, __m256 odd) {
    const __m256i high = _mm256_and_si256(Rounded(odd), _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    const __m256i pairs = _mm256_or_si256(_mm256_srli_epi32(Rounded(even), 16), high);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), pairs);
  }
};

}  // namespace

constinit const MlaKernels kAvx2Mla = MakeMla<Avx2>();

}  // namespace hmoe
