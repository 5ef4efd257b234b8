// The vocabulary of AVX-512 with VBMI, GFNI and BF16: weights become bfloat16 by bit matrices and look-ups,
// and two products go into every lane at once. (AMX decodes with it too.)
#pragma once

#include <immintrin.h>

#include "codec/e4m3.h"
#include "codec/nibbles.h"
#include "kernels/isa/spread512.h"

namespace hmoe {
namespace {

struct Avx512Bf16 : Spread512 {
  static constexpr DecodeWay kWay = DecodeWay::kBytes;
  static constexpr int kLanes = 16, kWidth = 32, kStep = 64, kOperands = 2, kNibbleStep = 128;
  static constexpr int kTile = 8, kBlockRows = 4, kBlockTokens = 3;
  static constexpr double kMultiplyCycles = 1;  // 0.5 on Zen 5, 1 on Zen 4, 2 on Sapphire Rapids
  using Operand = __m512i;                      // 32 bfloat16
  using Packed = uint16_t;
  using Bytes = __m512i;

  static Operand Load(const uint16_t* packed) { return _mm512_loadu_si512(packed); }
  static void Store(uint16_t* to, Operand x) { _mm512_storeu_si512(to, x); }

  // Lane i adds the products of elements 2i and 2i + 1.
  static Acc MultiplyAdd(Operand a, Operand b, Acc sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }

  static Bytes LoadBytes(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  static Bytes AddBytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
  static Bytes EveryByte(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  static Bytes MaxBytes(Bytes a, Bytes b) { return _mm512_max_epu8(a, b); }
  static bool AllAtMost(Bytes x, int most) { return _mm512_cmpgt_epu8_mask(x, EveryByte(most)) == 0; }
  template <int kFlipped>
  static Bytes Affine(Bytes x, uint64_t matrix) {
    return _mm512_gf2p8affine_epi64_epi8(x, _mm512_set1_epi64(static_cast<long long>(matrix)), kFlipped);
  }
  static Bytes LookUp(const uint8_t* table, Bytes index) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
  }
  // `to`, with the bits of `mask` taken from `from`. 0xca is "mask ? from : to" as a truth table of (mask,
  // from, to).
  static Bytes CopyBits(Bytes to, Bytes from, int mask) {
    return _mm512_ternarylogic_epi32(EveryByte(mask), from, to, 0xca);
  }

  // Within every 16 bytes the unpack instructions pair the first eight into one operand, the last into the
  // other.
  static void Interleave(Bytes low, Bytes high, Operand* out) {
    out[0] = _mm512_unpacklo_epi8(low, high);
    out[1] = _mm512_unpackhi_epi8(low, high);
  }
  static constexpr int InterleavedPosition(int column) {
    return column % 16 / 8 * 32 + column / 16 * 8 + column % 8;
  }

  static void LoadBf16(const uint8_t* bytes, Operand* out) {
    out[0] = _mm512_loadu_si512(bytes);
    out[1] = _mm512_loadu_si512(bytes + 64);
  }

  // Small integers as floats have nothing in their lower halves, so two vectors of upper halves make one
  // operand: the first sixteen columns in the even places, the others in the odd ones.
  static void FromInt8(const uint8_t* bytes, Operand* out) {
    for (int i = 0; i < kOperands; ++i) {
      const __m512i even = FloatBits(bytes + 32 * i), odd = FloatBits(bytes + 32 * i + 16);
      out[i] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
    }
  }
  static constexpr int Int8Position(int column) {
    return column / 32 * 32 + column % 16 * 2 + column % 32 / 16;
  }

  // The four weights of a 16-bit word go to four operands, so a lane (two words) has eight columns in a row:
  // its own group's. The look-up heeds five bits of an index, and the table is there twice.
  static void LookUpNibbles(const NibbleTable& table, const uint8_t* bytes, Operand* out) {
    const __m512i words = _mm512_loadu_si512(bytes), values = _mm512_load_si512(table.bf16);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      out[j] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, static_cast<unsigned>(4 * j)), values);
    }
  }
  static constexpr int NibblePosition(int column) { return column % 4 * 32 + column / 4; }

  static uint16_t FromBf16(uint16_t bits) { return bits; }
  static float ToFloat(uint16_t bits) { return FloatFromBf16(bits); }

 private:
  static __m512i FloatBits(const uint8_t* bytes) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(stored)));
  }
};

}  // namespace
}  // namespace hmoe
