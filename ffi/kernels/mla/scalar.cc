// Plain C++: the meaning of the kernels of latent attention.

#include <cmath>

#include "codec/bf16.h"
#include "kernels/mla/kernels.h"

namespace hmoe {
namespace {

struct Scalar {
  struct Acc {
    float lane[kPanel];
  };
  struct Pairs {
    uint16_t half[2 * kPanel];
  };

  template <typename F>
  static Acc Each(F&& f) {
    Acc result;
    for (int i = 0; i < kPanel; ++i) result.lane[i] = f(i);
    return result;
  }

  static Acc Zero() { return {}; }
  static Acc Set1(float x) {
    return Each([=](int) { return x; });
  }
  static Acc Load(const float* from) {
    return Each([=](int i) { return from[i]; });
  }
  static void Store(float* to, const Acc& x) { __builtin_memcpy(to, x.lane, sizeof x.lane); }
  static Acc Add(const Acc& a, const Acc& b) {
    return Each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Acc Sub(const Acc& a, const Acc& b) {
    return Each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static Acc Mul(const Acc& a, const Acc& b) {
    return Each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  // b where either is NaN, as the vector instructions do.
  static Acc Max(const Acc& a, const Acc& b) {
    return Each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Acc Round(const Acc& a) {
    return Each([&](int i) { return std::nearbyintf(a.lane[i]); });
  }
  static Acc MultiplyAddFloats(const Acc& a, const Acc& b, const Acc& sum) {
    return Each([&](int i) { return a.lane[i] * b.lane[i] + sum.lane[i]; });
  }
  static Acc TimesPowerOf2(const Acc& a, const Acc& n) {
    return Each([&](int i) { return a.lane[i] * std::exp2f(n.lane[i]); });
  }
  static float Sum(const Acc& a) {
    float sum[8];
    for (int i = 0; i < 8; ++i) sum[i] = a.lane[i] + a.lane[i + 8];
    for (int i = 0; i < 4; ++i) sum[i] += sum[i + 4];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }

  static Pairs LoadPairs(const uint16_t* from) {
    Pairs pairs;
    __builtin_memcpy(pairs.half, from, sizeof pairs.half);
    return pairs;
  }
  static Pairs BroadcastPair(uint32_t pair) {
    Pairs pairs;
    for (int i = 0; i < kPanel; ++i) __builtin_memcpy(pairs.half + 2 * i, &pair, sizeof pair);
    return pairs;
  }
  static Acc MultiplyAdd(const Pairs& a, const Pairs& b, const Acc& sum) {
    const auto times = [&](int i) { return FloatFromBf16(a.half[i]) * FloatFromBf16(b.half[i]); };
    return Each([&](int i) { return sum.lane[i] + times(2 * i) + times(2 * i + 1); });
  }

  static void ZipRows(const uint16_t* even, const uint16_t* odd, uint16_t* to) {
    for (int i = 0; i < kPanel; ++i) {
      to[2 * i] = even[i];
      to[2 * i + 1] = odd[i];
    }
  }
  static void StoreBf16(const Acc& x, uint16_t* to) {
    for (int i = 0; i < kPanel; ++i) to[i] = Bf16FromFloat(x.lane[i]);
  }
  static void StoreRounded(const Acc& even, const Acc& odd, uint16_t* to, int64_t stride) {
    for (int i = 0; i < kPanel; ++i) {
      to[i * stride] = Bf16FromFloat(even.lane[i]);
      to[i * stride + 1] = Bf16FromFloat(odd.lane[i]);
    }
  }
};

}  // namespace

constinit const MlaKernels kScalarMla = MakeMla<Scalar>();

}  // namespace hmoe
