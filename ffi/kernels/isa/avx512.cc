// AVX-512 F, BW, VL, DQ: sixteen floats at a time.

#include <immintrin.h>

#include "kernels/isa/dot_peak.h"
#include "kernels/isa/spread512.h"
#include "kernels/vector_projection.h"

namespace hmoe {
namespace {

struct Avx512 : Spread512 {
  using Dot = DotFma512;
  static constexpr DecodeWay kWay = DecodeWay::kHalf;
  static constexpr int kLanes = 16, kWidth = 16, kStep = 32, kOperands = 2, kNibbleStep = 128;
  static constexpr int kTile = 8, kBlockRows = 4, kBlockTokens = 3;
  static constexpr double kMultiplyCycles = 0.5;
  using Operand = __m512;
  using Packed = float;
  using Words = __m512i;  // 16-bit lanes

  static Operand Load(const float* packed) { return _mm512_loadu_ps(packed); }
  static void Store(float* to, Operand x) { _mm512_storeu_ps(to, x); }

  static Acc MultiplyAdd(Operand a, Operand b, Acc sum) { return _mm512_fmadd_ps(a, b, sum); }

  static Words WidenBytes(const uint8_t* bytes) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
  }
  static Words And(Words a, int bits) {
    return _mm512_and_si512(a, _mm512_set1_epi16(static_cast<short>(bits)));
  }
  static Words Or(Words a, Words b) { return _mm512_or_si512(a, b); }
  static Words Equal(Words a, int b) {
    return _mm512_movm_epi16(_mm512_cmpeq_epi16_mask(a, _mm512_set1_epi16(static_cast<short>(b))));
  }
  template <int kBits>
  static Words ShiftLeft(Words a) {
    return _mm512_slli_epi16(a, kBits);
  }
  static void HalvesToFloats(Words halves, Operand* out) {
    out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
  }

  static void LoadBf16(const uint8_t* bytes, Operand* out) {
    for (int i = 0; i < kOperands; ++i) {
      const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes) + i);
      out[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(stored), 16));
    }
  }

  static void FromInt8(const uint8_t* bytes, Operand* out) {
    for (int i = 0; i < kOperands; ++i) {
      const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes) + i);
      out[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(stored));
    }
  }
  static constexpr int Int8Position(int column) { return column; }

  // Lane i takes the eight weights of word i, one for each operand: its own group's. The look-up heeds the
  // low four bits of an index.
  static void LookUpNibbles(const NibbleTable& table, const uint8_t* bytes, Operand* out) {
    const __m512i words = _mm512_loadu_si512(bytes);
    const __m512 values = _mm512_load_ps(table.value);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      out[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, static_cast<unsigned>(4 * j)), values);
    }
  }
  static constexpr int NibblePosition(int column) { return column % 8 * kLanes + column / 8; }

  static float FromBf16(uint16_t bits) { return FloatFromBf16(bits); }
  static float ToFloat(float value) { return value; }

  static uint64_t Read(const uint8_t* memory, int64_t bytes) {
    __m512i seen[4];
    for (auto& part : seen) part = _mm512_setzero_si512();
    for (int64_t i = 0; i < bytes; i += sizeof seen) {
      for (int j = 0; j < 4; ++j)
        seen[j] = _mm512_xor_si512(seen[j], _mm512_loadu_si512(memory + i + 64 * j));
    }
    for (int j = 1; j < 4; ++j) seen[0] = _mm512_xor_si512(seen[0], seen[j]);
    return static_cast<uint64_t>(_mm512_reduce_add_epi64(seen[0]));
  }
};

}  // namespace

constinit const IsaKernels kAvx512Kernels = VectorKernels<Avx512>::Make();

}  // namespace hmoe
