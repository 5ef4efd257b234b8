// AVX2 with FMA and F16C: eight floats at a time.

#include <immintrin.h>

#include "kernels/projection.h"

namespace hmoe {
namespace {

struct Avx2 {
  using Dot = DotFma256;
  static constexpr DecodeWay kWay = DecodeWay::kHalf;
  // Sixteen registers hold the two accumulators of four tokens, the operands of a step and their temporaries.
  static constexpr int kStep = 16, kOperands = 2, kTile = 4;
  using Operand = __m256;
  using Acc = __m256;
  using Packed = float;
  using Words = __m256i;  // 16-bit lanes

  static Acc Zero() { return _mm256_setzero_ps(); }
  static Operand Load(const float* packed) { return _mm256_loadu_ps(packed); }
  static void Store(float* to, Operand x) { _mm256_storeu_ps(to, x); }

  static Acc MultiplyAdd(Operand a, Operand b, Acc sum) { return _mm256_fmadd_ps(a, b, sum); }
  static Acc ScaleAdd(Acc block, float scale, Acc sum) {
    return _mm256_fmadd_ps(block, _mm256_set1_ps(scale), sum);
  }
  static Acc Add(Acc block, Acc sum) { return _mm256_add_ps(sum, block); }
  static float Sum(Acc acc) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps(acc, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static Words WidenBytes(const uint8_t* bytes) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  static Words And(Words a, int bits) {
    return _mm256_and_si256(a, _mm256_set1_epi16(static_cast<short>(bits)));
  }
  static Words Or(Words a, Words b) { return _mm256_or_si256(a, b); }
  static Words Equal(Words a, int b) {
    return _mm256_cmpeq_epi16(a, _mm256_set1_epi16(static_cast<short>(b)));
  }
  template <int kBits>
  static Words ShiftLeft(Words a) {
    return _mm256_slli_epi16(a, kBits);
  }
  static void HalvesToFloats(Words halves, Operand* out) {
    out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  }

  static void LoadBf16(const uint8_t* bytes, Operand* out) {
    for (int i = 0; i < kOperands; ++i) {
      const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes) + i);
      out[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(stored), 16));
    }
  }

  static float FromBf16(uint16_t bits) { return FloatFromBf16(bits); }
  static float ToFloat(float value) { return value; }

  static uint64_t Read(const uint8_t* memory, int64_t bytes) {
    __m256i seen[8];
    for (auto& part : seen) part = _mm256_setzero_si256();
    for (int64_t i = 0; i < bytes; i += sizeof seen) {
      for (int j = 0; j < 8; ++j) {
        seen[j] =
            _mm256_xor_si256(seen[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(memory + i) + j));
      }
    }
    for (int j = 1; j < 8; ++j) seen[0] = _mm256_xor_si256(seen[0], seen[j]);
    return static_cast<uint64_t>(_mm256_extract_epi64(seen[0], 0) ^ _mm256_extract_epi64(seen[0], 3));
  }
};

}  // namespace

constinit const IsaKernels kAvx2Kernels = MakeKernels<Avx2>();

}  // namespace hmoe
