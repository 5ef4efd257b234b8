// Plain C++: the meaning of the kernels, and what a machine without vector instructions that we know runs.

#include "kernels/projection.h"

namespace hmoe {
namespace {

// Eight lanes, so that a block is not one long chain of additions; compilers find what vectors there are.
struct Scalar {
  using Dot = DotPlain;
  static constexpr DecodeWay kWay = DecodeWay::kTable;
  static constexpr int kStep = 8, kOperands = 1, kTile = 4;
  struct Operand {
    float lane[kStep];
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
    for (int i = 0; i < kStep; ++i) sum.lane[i] += a.lane[i] * b.lane[i];
    return sum;
  }
  static Acc ScaleAdd(const Acc& block, float scale, Acc sum) {
    for (int i = 0; i < kStep; ++i) sum.lane[i] += block.lane[i] * scale;
    return sum;
  }
  static Acc Add(const Acc& block, Acc sum) {
    for (int i = 0; i < kStep; ++i) sum.lane[i] += block.lane[i];
    return sum;
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
  static void LookUpFloats(const float* table, const uint8_t* bytes, Operand* out) {
    for (int i = 0; i < kStep; ++i) out->lane[i] = table[bytes[i]];
  }

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

constinit const IsaKernels kScalarKernels = MakeKernels<Scalar>();

}  // namespace hmoe
