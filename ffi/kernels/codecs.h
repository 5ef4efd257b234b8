// All codecs, in the order of CodecId, for the files that instantiate kernels over them.
#pragma once

#include "codec/bf16.h"
#include "codec/fp8_block.h"
#include "codec/fp8_channel.h"
#include "codec/int4_group.h"
#include "codec/int8_channel.h"
#include "codec/mxfp4.h"
#include "kernels/elementwise.h"
#include "kernels/matrix.h"
#include "kernels/table.h"

namespace hmoe {
namespace {

// Builds the table of an ISA: `KernelsOf<C>::Make()` gives those of one codec.
template <template <typename> typename KernelsOf>
constexpr IsaKernels MakeIsaKernels(uint64_t (*read)(const uint8_t*, int64_t),
                                    int64_t (*multiply_adds)(int64_t, float*)) {
  return {{KernelsOf<Bf16>::Make(), KernelsOf<Fp8Block>::Make(), KernelsOf<Fp8Channel>::Make(),
           KernelsOf<Int8Channel>::Make(), KernelsOf<Int4Group<32>>::Make(), KernelsOf<Int4Group<64>>::Make(),
           KernelsOf<Int4Group<128>>::Make(), KernelsOf<Mxfp4>::Make()},
          SwiGlu,
          AddScaled,
          read,
          multiply_adds};
}

// A row as a kernel walks it.
struct Row {
  const uint8_t* weights;
  const uint8_t* scales;  // of its blocks or groups
};

// Columns that share a scale within a row, and bytes of scales of a row; 0 where a scale belongs to all of
// it.
template <typename C>
constexpr int64_t ColumnsPerScale() {
  if constexpr (IsGroup(C::kScaling)) return C::kGroup;
  return C::kScaling == Scaling::kBlock ? 128 : 0;
}
template <typename C>
int64_t ScaleBytesPerRow(int64_t cols) {
  constexpr int64_t kColumns = ColumnsPerScale<C>();
  if constexpr (kColumns == 0) {
    return 0;
  } else {
    return (cols + kColumns - 1) / kColumns * BytesOfScale(C::kScaling);
  }
}

template <typename C>
Row RowOf(const Matrix& matrix, int64_t row) {
  return {matrix.weights + row * matrix.cols * C::kBits / 8,
          matrix.scales + row / matrix.rows_per_scale * ScaleBytesPerRow<C>(matrix.cols)};
}

// Where the scales of successive rows are, counted in rows of scales: a division for the first alone.
class ScalePlace {
 public:
  ScalePlace(const Matrix& matrix, int64_t row)
      : rows_per_scale_(matrix.rows_per_scale), place_(row / rows_per_scale_), next_(row % rows_per_scale_) {}

  int64_t operator*() const { return place_; }
  void operator++() {
    if (++next_ == rows_per_scale_) {
      next_ = 0;
      ++place_;
    }
  }

 private:
  const int64_t rows_per_scale_;
  int64_t place_, next_;
};

// The scale of a whole row, where a codec has such.
template <typename C>
float RowScale(const Matrix& matrix, int64_t place) {
  if constexpr (C::kScaling != Scaling::kRow) {
    return 1;
  } else {
    if (matrix.scales_are_bf16) {
      uint16_t bits;
      __builtin_memcpy(&bits, matrix.scales + 2 * place, sizeof bits);
      return FloatFromBf16(bits);
    }
    float scale;
    __builtin_memcpy(&scale, matrix.scales + 4 * place, sizeof scale);
    return scale;
  }
}

// The place of a column's packed activation, for an ISA with the vocabulary `V`.
template <typename V, typename C>
constexpr int64_t PackedPosition(int64_t column) {
  constexpr int kStep = C::template kStep<V>;
  return column / kStep * kStep + C::template Position<V>(static_cast<int>(column % kStep));
}

// What CodecKernels::decode does.
template <typename V, typename C>
void DecodeAll(const uint8_t* bytes, int64_t count, float* out) {
  constexpr int kStep = C::template kStep<V>;
  for (int64_t step = 0; step < count; step += kStep) {
    typename V::Operand weights[kStep / V::kWidth];
    typename V::Packed stored[kStep];
    C::template Decode<V>(bytes + step * C::kBits / 8, weights);
    for (int i = 0; i < kStep / V::kWidth; ++i) V::Store(stored + i * V::kWidth, weights[i]);
    for (int c = 0; c < kStep; ++c) {
      out[step + c] = V::ToFloat(stored[C::template Position<V>(c)]) * C::template kFactor<V>;
    }
  }
}

}  // namespace
}  // namespace hmoe
