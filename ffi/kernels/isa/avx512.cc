// AVX-512 F, BW, VL, DQ: sixteen floats at a time.

#include <immintrin.h>

#include "kernels/projection.h"

namespace hmoe {
namespace {

struct Avx512 {
  using Dot = DotFma512;
  static constexpr DecodeWay kWay = DecodeWay::kHalf;
  static constexpr int kStep = 32, kOperands = 2, kTile = 8;
  using Operand = __m512;
  using Acc = __m512;
  using Packed = float;
  using Words = __m512i;  // 16-bit lanes

  static Acc Zero() { return _mm512_setzero_ps(); }
  static Operand Load(const float* packed) { return _mm512_loadu_ps(packed); }
  static void Store(float* to, Operand x) { _mm512_storeu_ps(to, x); }

  static Acc MultiplyAdd(Operand a, Operand b, Acc sum) { return _mm512_fmadd_ps(a, b, sum); }
  static Acc ScaleAdd(Acc block, float scale, Acc sum) {
    return _mm512_fmadd_ps(block, _mm512_set1_ps(scale), sum);
  }
  static Acc Add(Acc block, Acc sum) { return _mm512_add_ps(sum, block); }
  static float Sum(Acc acc) { return _mm512_reduce_add_ps(acc); }

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

constinit const IsaKernels kAvx512Kernels = MakeKernels<Avx512>();

}  // namespace hmoe
