// Matrices with an answer in double precision, in every codec.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "codec/codec.h"
#include "codec/e4m3.h"
#include "codec/mxfp4.h"
#include "kernels/matrix.h"
#include "tests/check.h"

namespace hmoe::test {

// How many rows share a scale: as many as the codec knows, or one.
enum class Sharing { kMost, kOne };

// Owns the bytes of a matrix at odd addresses, in buffers without a byte to spare: a sanitizer sees every
// read beyond.
class RandomMatrix {
 public:
  RandomMatrix(const Codec& codec, int64_t rows, int64_t cols, std::mt19937& random,
               Sharing sharing = Sharing::kMost)
      : codec_(codec),
        rows_(rows),
        cols_(cols),
        weights_(static_cast<size_t>(1 + codec.WeightBytes(rows, cols))) {
    for (size_t i = 1; i < weights_.size(); ++i) weights_[i] = static_cast<uint8_t>(random());
    switch (codec.id) {
      case CodecId::kBf16:
        for (int64_t i = 0; i < rows * cols; ++i)
          PutBf16(&weights_[static_cast<size_t>(1 + 2 * i)], Small(random));
        break;
      case CodecId::kFp8Block:
      case CodecId::kFp8Channel:
        for (size_t i = 1; i < weights_.size(); ++i) {
          if ((weights_[i] & 0x7f) == 0x7f) weights_[i] = 0;  // no NaN
        }
        break;
      default:
        break;
    }
    const bool shares_all = sharing == Sharing::kMost && codec.columns_per_scale == Codec::kWholeRow;
    const bool shares_block = sharing == Sharing::kMost && codec.id == CodecId::kFp8Block;
    rows_per_scale_ = shares_all ? rows : shares_block ? kBlock : 1;
    scales_per_row_ = !codec.has_scales()                           ? 0
                      : codec.columns_per_scale == Codec::kWholeRow ? 1
                                                                    : CeilDiv(cols, codec.columns_per_scale);
    const int64_t count = CeilDiv(rows, rows_per_scale_) * scales_per_row_;
    scales_.resize(static_cast<size_t>(1 + count * BytesPerScale()));
    for (int64_t i = 0; i < count; ++i) {
      uint8_t* to = &scales_[static_cast<size_t>(1 + i * BytesPerScale())];
      const float scale = std::ldexp(1 + Small(random) / 2, -8);
      if (scale_type() == ScaleType::kE8M0) {
        *to = static_cast<uint8_t>(115 + random() % 10);
      } else if (scale_type() == ScaleType::kBf16) {
        PutBf16(to, scale);
      } else {
        std::memcpy(to, &scale, sizeof scale);
      }
    }
  }

  Matrix matrix() const {
    const auto described = codec_.Describe(rows_, cols_, std::span(weights_).subspan(1),
                                           std::span(scales_).subspan(1), scale_type());
    CHECK(described.ok());
    return described.value();
  }
  std::vector<uint8_t> weights() const { return {weights_.begin() + 1, weights_.end()}; }
  std::vector<uint8_t> scales() const { return {scales_.begin() + 1, scales_.end()}; }

  ScaleType scale_type() const {
    if (codec_.id == CodecId::kMxfp4) return ScaleType::kE8M0;
    return codec_.bits_per_weight == 4 ? ScaleType::kBf16 : ScaleType::kFloat32;
  }

  double Value(int64_t row, int64_t col) const { return Stored(row * cols_ + col) * Scale(row, col); }

 private:
  static float Small(std::mt19937& random) { return std::uniform_real_distribution<float>(-1, 1)(random); }
  static void PutBf16(uint8_t* to, float value) {
    const uint16_t bits = Bf16FromFloat(value);
    std::memcpy(to, &bits, sizeof bits);
  }
  static float GetBf16(const uint8_t* from) {
    uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return FloatFromBf16(bits);
  }

  int64_t BytesPerScale() const {
    return scale_type() == ScaleType::kE8M0 ? 1 : scale_type() == ScaleType::kBf16 ? 2 : 4;
  }

  double Stored(int64_t i) const {
    const uint8_t* bytes = weights_.data() + 1;
    const int nibble = bytes[codec_.bits_per_weight == 4 ? i / 2 : 0] >> (i % 2 * 4) & 15;
    switch (codec_.id) {
      case CodecId::kBf16:
        return GetBf16(bytes + 2 * i);
      case CodecId::kFp8Block:
      case CodecId::kFp8Channel:
        return FloatFromE4M3(bytes[i]);
      case CodecId::kInt8Channel:
        return static_cast<int8_t>(bytes[i]);
      case CodecId::kMxfp4:
        return FloatFromE2M1(nibble);
      default:
        return nibble - 8;
    }
  }

  double Scale(int64_t row, int64_t col) const {
    if (scales_per_row_ == 0) return 1;
    const int64_t group = codec_.columns_per_scale == Codec::kWholeRow ? 0 : col / codec_.columns_per_scale;
    const uint8_t* from = &scales_[static_cast<size_t>(1 + (row / rows_per_scale_ * scales_per_row_ + group) *
                                                               BytesPerScale())];
    if (scale_type() == ScaleType::kE8M0) return std::ldexp(1.0, *from - 127);
    if (scale_type() == ScaleType::kBf16) return GetBf16(from);
    float scale;
    std::memcpy(&scale, from, sizeof scale);
    return scale;
  }

  Codec codec_;
  int64_t rows_, cols_;
  int64_t rows_per_scale_, scales_per_row_;
  std::vector<uint8_t> weights_, scales_;
};

inline std::vector<uint16_t> RandomActivations(int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<uint16_t> activations(static_cast<size_t>(count));
  for (uint16_t& x : activations) x = Bf16FromFloat(normal(random));
  return activations;
}

}  // namespace hmoe::test
