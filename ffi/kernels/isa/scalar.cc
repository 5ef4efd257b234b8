// Plain C++: the meaning of the kernels, and what a machine without vector instructions that we know runs.

#include "kernels/isa/dot_peak.h"
#include "kernels/vector_projection.h"

namespace hmoe {
namespace {

// Eight lanes, so that a block is not one long chain of additions; compilers find what vectors there are.
struct Scalar {
  using Dot = DotPlain;
  static constexpr DecodeWay kWay = DecodeWay::kTable;
  static constexpr int kLanes = 8, kWidth = 8, kStep = 8, kNibbleStep = 64;
  static constexpr int kTile = 4, kBlockRows = 2, kBlockTokens = 2;
  static constexpr double kMultiplyCycles = 4;
  struct Operand {
    float lane[kLanes];
  };
  using Acc = Operand;
  using Packed = float;

  static Acc Zero() { return {}; }
  static Operand Load(const float* packed) {
    Operand x;
    __builtin_memcpy(&x, packed, sizeof x);
    return x;
  }
  static void Store(float* to, const Operand& x) { __builtin_memcpy(to, &x, sizeof x); }

  static Acc MultiplyAdd(const Operand& a, const Operand& b, Acc sum) {
    for (int i = 0; i < kLanes; ++i) sum.lane[i] += a.lane[i] * b.lane[i];
    return sum;
  }
  static Acc MultiplyAddFloats(const Acc& a, const Acc& b, const Acc& sum) { return MultiplyAdd(a, b, sum); }
  static Acc Add(const Acc& a, Acc sum) {
    for (int i = 0; i < kLanes; ++i) sum.lane[i] += a.lane[i];
    return sum;
  }
  static Acc Broadcast(float value) {
    Acc all;
    for (int i = 0; i < kLanes; ++i) all.lane[i] = value;
    return all;
  }
  template <int kCount>
  static Acc SpreadBf16(const uint8_t* bytes) {
    Acc spread;
    for (int i = 0; i < kLanes; ++i) {
      uint16_t bits;
      __builtin_memcpy(&bits, bytes + 2 * (i * kCount / kLanes), sizeof bits);
      spread.lane[i] = FloatFromBf16(bits);
    }
    return spread;
  }
  template <int kCount>
  static Acc SpreadE8M0(const uint8_t* bytes) {
    Acc spread;
    for (int i = 0; i < kLanes; ++i) spread.lane[i] = FloatFromE8M0(bytes[i * kCount / kLanes]);
    return spread;
  }
  static float Sum(const Acc& acc) {
    float pair[4];
    for (int i = 0; i < 4; ++i) pair[i] = acc.lane[i] + acc.lane[i + 4];
    return (pair[0] + pair[2]) + (pair[1] + pair[3]);
  }

  static void LoadBf16(const uint8_t* bytes, Operand* out) {
    uint16_t stored[kStep];
    __builtin_memcpy(stored, bytes, sizeof stored);
    for (int i = 0; i < kStep; ++i) out->lane[i] = FloatFromBf16(stored[i]);
  }
  static void LookUpBytes(const float* table, const uint8_t* bytes, Operand* out) {
    for (int i = 0; i < kStep; ++i) out->lane[i] = table[bytes[i]];
  }
  static void FromInt8(const uint8_t* bytes, Operand* out) {
    for (int i = 0; i < kStep; ++i) out->lane[i] = static_cast<int8_t>(bytes[i]);
  }
  static constexpr int Int8Position(int column) { return column; }

  // Lane i takes the eight weights of word i, one for each operand: its own group's.
  static void LookUpNibbles(const NibbleTable& table, const uint8_t* bytes, Operand* out) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < 8; ++j) out[j].lane[i] = table.value[bytes[4 * i + j / 2] >> (j % 2 * 4) & 15];
    }
  }
  static constexpr int NibblePosition(int column) { return column % 8 * kLanes + column / 8; }

  static float FromBf16(uint16_t bits) { return FloatFromBf16(bits); }
  static float ToFloat(float value) { return value; }

  static uint64_t Read(const uint8_t* memory, int64_t bytes) {
    uint64_t seen = 0, word;
    for (int64_t i = 0; i < bytes; i += sizeof word) {
      __builtin_memcpy(&word, memory + i, sizeof word);
      seen ^= word;
    }
    return seen;
  }
};

}  // namespace

constinit const IsaKernels kScalarKernels = VectorKernels<Scalar>::Make();

}  // namespace hmoe
