// AVX2 with FMA and F16C: eight floats at a time.

#include <immintrin.h>

#include "kernels/isa/dot_peak.h"
#include "kernels/vector_projection.h"

namespace hmoe {
namespace {

struct Avx2 {
  using Dot = DotFma256;
  static constexpr DecodeWay kWay = DecodeWay::kHalf;
  static constexpr int kLanes = 8, kWidth = 8, kStep = 16, kOperands = 2, kNibbleStep = 64;
  // Sixteen registers hold the two accumulators of four tokens, the operands of a step and their temporaries.
  static constexpr int kTile = 4, kBlockRows = 2, kBlockTokens = 2;
  static constexpr double kMultiplyCycles = 0.5;
  using Operand = __m256;
  using Acc = __m256;
  using Packed = float;
  using Words = __m256i;  // 16-bit lanes

  static Acc Zero() { return _mm256_setzero_ps(); }
  static Operand Load(const float* packed) { return _mm256_loadu_ps(packed); }
  static void Store(float* to, Operand x) { _mm256_storeu_ps(to, x); }

  static Acc MultiplyAdd(Operand a, Operand b, Acc sum) { return _mm256_fmadd_ps(a, b, sum); }
  static Acc MultiplyAddFloats(Acc a, Acc b, Acc sum) { return _mm256_fmadd_ps(a, b, sum); }
  static Acc Add(Acc a, Acc sum) { return _mm256_add_ps(sum, a); }
  static Acc Broadcast(float value) { return _mm256_set1_ps(value); }
  template <int kCount>
  static Acc SpreadBf16(const uint8_t* bytes) {
    uint16_t bits[2];
    __builtin_memcpy(bits, bytes, 2 * kCount);
    return Halves(FloatFromBf16(bits[0]), FloatFromBf16(bits[kCount - 1]));
  }
  template <int kCount>
  static Acc SpreadE8M0(const uint8_t* bytes) {
    return Halves(FloatFromE8M0(bytes[0]), FloatFromE8M0(bytes[kCount - 1]));
  }
  static Acc Halves(float low, float high) { return _mm256_set_m128(_mm_set1_ps(high), _mm_set1_ps(low)); }
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

  static void FromInt8(const uint8_t* bytes, Operand* out) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    out[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(stored));
    out[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(stored, stored)));
  }
  static constexpr int Int8Position(int column) { return column; }

  // Lane i takes the eight weights of word i, one for each operand: its own group's. A look-up has eight
  // places, so there are two, and the index's highest bit, moved to the sign, chooses.
  static void LookUpNibbles(const NibbleTable& table, const uint8_t* bytes, Operand* out) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    const __m256 low = _mm256_load_ps(table.value), high = _mm256_load_ps(table.value + 8);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m256i index = _mm256_srli_epi32(words, 4 * j);
      out[j] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                                _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }
  }
  static constexpr int NibblePosition(int column) { return column % 8 * kLanes + column / 8; }

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

constinit const IsaKernels kAvx2Kernels = VectorKernels<Avx2>::Make();

}  // namespace hmoe
