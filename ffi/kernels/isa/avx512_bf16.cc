// AVX-512 with VBMI and BF16: weights become bfloat16 by byte look-ups, and two products go into every lane
// at once.

#include <immintrin.h>

#include "kernels/projection.h"

namespace hmoe {
namespace {

struct Avx512Bf16 {
  using Dot = DotBf16;
  static constexpr DecodeWay kWay = DecodeWay::kByteLookUp;
  static constexpr int kStep = 64, kOperands = 2, kTile = 8;
  using Operand = __m512i;  // 32 bfloat16
  using Acc = __m512;
  using Packed = uint16_t;
  using Bytes = __m512i;

  static Acc Zero() { return _mm512_setzero_ps(); }
  static Operand Load(const uint16_t* packed) { return _mm512_loadu_si512(packed); }
  static void Store(uint16_t* to, Operand x) { _mm512_storeu_si512(to, x); }

  // Lane i adds the products of elements 2i and 2i + 1.
  static Acc MultiplyAdd(Operand a, Operand b, Acc sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static Acc ScaleAdd(Acc block, float scale, Acc sum) {
    return _mm512_fmadd_ps(block, _mm512_set1_ps(scale), sum);
  }
  static Acc Add(Acc block, Acc sum) { return _mm512_add_ps(sum, block); }
  static float Sum(Acc acc) { return _mm512_reduce_add_ps(acc); }

  static Bytes LoadBytes(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  static Bytes LookUp(const uint8_t* table, Bytes index) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
  }
  // `to`, with the bits of `mask` taken from `from`. 0xca is "mask ? from : to" as a truth table of (mask,
  // from, to).
  static Bytes CopyBits(Bytes to, Bytes from, int mask) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(mask)), from, to, 0xca);
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

  static uint16_t FromBf16(uint16_t bits) { return bits; }
  static float ToFloat(uint16_t bits) { return FloatFromBf16(bits); }

  static uint64_t Read(const uint8_t* memory, int64_t bytes) { return kAvx512Kernels.read(memory, bytes); }
};

}  // namespace

constinit const IsaKernels kAvx512Bf16Kernels = MakeKernels<Avx512Bf16>();

}  // namespace hmoe
