#include "kernels/rms_norm.h"

#include <cmath>

#include "codec/bf16.h"

namespace hmoe {
namespace {

constexpr int64_t kLanes = 32;

// In as many sums as a compiler likes to keep in vectors; then these by halves.
float SumOfSquares(const uint16_t* x, int64_t count) {
  float sums[kLanes] = {};
  const auto add = [&](int64_t begin, int64_t lanes) {
    for (int64_t i = 0; i < lanes; ++i) {
      const float value = FloatFromBf16(x[begin + i]);
      sums[i] += value * value;
    }
  };
  int64_t begin = 0;
  for (; begin + kLanes <= count; begin += kLanes) add(begin, kLanes);
  add(begin, count - begin);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

}  // namespace

void RmsNorm(const uint16_t* x, const uint16_t* weight, int64_t rows, int64_t cols, float eps,
             uint16_t* out) {
  for (int64_t row = 0; row < rows; ++row, x += cols, out += cols) {
    const float scale = 1.0f / std::sqrt(SumOfSquares(x, cols) / static_cast<float>(cols) + eps);
    for (int64_t i = 0; i < cols; ++i) {
      out[i] = Bf16FromFloat(FloatFromBf16(x[i]) * scale * FloatFromBf16(weight[i]));
    }
  }
}

}  // namespace hmoe
