// Matrices with an answer in double precision.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "codec/codec.h"
#include "codec/fp8_block.h"
#include "kernels/matrix.h"

namespace hmoe::test {

// Owns the bytes of a matrix at odd addresses, in buffers without a byte to spare: a sanitizer sees every
// read beyond.
class RandomMatrix {
 public:
  RandomMatrix(const Codec& codec, int64_t rows, int64_t cols, std::mt19937& random)
      : codec_(codec),
        rows_(rows),
        cols_(cols),
        weights_(static_cast<size_t>(1 + codec.WeightBytes(rows, cols))),
        scales_(static_cast<size_t>(1 + 4 * codec.NumScales(rows, cols))) {
    std::uniform_real_distribution<float> small(-1, 1);
    for (int64_t i = 0; i < rows * cols; ++i) {
      if (codec.id == CodecId::kBf16) {
        const uint16_t bits = Bf16FromFloat(small(random));
        std::memcpy(&weights_[static_cast<size_t>(1 + 2 * i)], &bits, sizeof bits);
      } else {
        const auto bits = static_cast<uint8_t>(random());
        weights_[static_cast<size_t>(1 + i)] = (bits & 0x7f) == 0x7f ? 0 : bits;
      }
    }
    for (int64_t i = 0; i < codec.NumScales(rows, cols); ++i) {
      const float scale = std::ldexp(1 + small(random) / 2, -8);
      std::memcpy(&scales_[static_cast<size_t>(1 + 4 * i)], &scale, sizeof scale);
    }
  }

  Matrix matrix() const {
    return {weights_.data() + 1, codec_.has_scales ? scales_.data() + 1 : nullptr, rows_, cols_};
  }
  std::vector<uint8_t> weights() const { return {weights_.begin() + 1, weights_.end()}; }
  std::vector<uint8_t> scales() const { return {scales_.begin() + 1, scales_.end()}; }

  double Value(int64_t row, int64_t col) const {
    const int64_t i = row * cols_ + col;
    if (codec_.id == CodecId::kBf16) {
      uint16_t bits;
      std::memcpy(&bits, &weights_[static_cast<size_t>(1 + 2 * i)], sizeof bits);
      return FloatFromBf16(bits);
    }
    const int64_t block = row / kBlock * CeilDiv(cols_, kBlock) + col / kBlock;
    float scale;
    std::memcpy(&scale, &scales_[static_cast<size_t>(1 + 4 * block)], sizeof scale);
    return double{FloatFromE4M3(weights_[static_cast<size_t>(1 + i)])} * scale;
  }

 private:
  Codec codec_;
  int64_t rows_, cols_;
  std::vector<uint8_t> weights_, scales_;
};

inline std::vector<uint16_t> RandomActivations(int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<uint16_t> activations(static_cast<size_t>(count));
  for (uint16_t& x : activations) x = Bf16FromFloat(normal(random));
  return activations;
}

}  // namespace hmoe::test
