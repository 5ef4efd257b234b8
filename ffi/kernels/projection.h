// The inner loop: rows of a matrix times a few packed vectors of activations, for any ISA `V` and any codec
// `C`.
//
// `V` is a small vocabulary of vector operations, one file each in kernels/isa. `C` says how stored bytes
// become operands, in terms of that vocabulary. Neither knows the other, so a format or an ISA is one file.
//
// The order of additions is part of the contract ("same bits"): 128 columns are summed into a fresh
// accumulator, that is scaled and added to the row's, and the row's lanes are added up at the end. Blocks do
// not depend on each other, so the processor overlaps them and a single accumulator per token hides the
// latency.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/bf16.h"
#include "codec/fp8_block.h"
#include "kernels/isa/dot_peak.h"
#include "kernels/table.h"

namespace hmoe {
namespace {

constexpr int64_t kColumns = 128;  // of a block
constexpr int64_t kGroup = 8;      // columns that packing moves together

// How far ahead of the walk. A Zen 5 machine read best with 2-8 KB; not yet tuned on others.
constexpr int64_t kPrefetchBytes = 4096;

template <typename V, typename C, int kTokens>
inline __attribute__((always_inline)) void AddBlock(const uint8_t* bytes, const uint8_t* scale_bytes,
                                                    const typename V::Packed* const* packed, int64_t column,
                                                    typename V::Acc* row) {
  typename V::Acc block[kTokens];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) block[t] = V::Zero();
#pragma GCC unroll 16
  for (int step = 0; step < kColumns; step += V::kStep) {
    typename V::Operand weights[V::kOperands];
    C::template Decode<V>(bytes + step * C::kBytesPerWeight, weights);
#pragma GCC unroll 4
    for (int i = 0; i < V::kOperands; ++i) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const auto x = V::Load(packed[t] + column + step + i * (V::kStep / V::kOperands));
        block[t] = V::MultiplyAdd(weights[i], x, block[t]);
      }
    }
  }
  if constexpr (C::kHasScales) {
    float scale;
    __builtin_memcpy(&scale, scale_bytes, sizeof scale);
    scale *= C::template kFactor<V>;
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) row[t] = V::ScaleAdd(block[t], scale, row[t]);
  } else {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) row[t] = V::Add(block[t], row[t]);
  }
}

template <typename V, typename C, int kTokens>
void ProjectTile(const Matrix& matrix, int64_t row_begin, int64_t row_end, const uint8_t* const* packed_bytes,
                 float* out, int64_t out_stride) {
  constexpr int64_t kBlockBytes = kColumns * C::kBytesPerWeight;
  const int64_t whole = matrix.cols / kColumns;
  const int64_t tail_bytes = (matrix.cols % kColumns) * C::kBytesPerWeight;
  const int64_t scale_row_bytes = (whole + (tail_bytes != 0)) * static_cast<int64_t>(sizeof(float));
  const typename V::Packed* packed[kTokens];
  for (int t = 0; t < kTokens; ++t) packed[t] = reinterpret_cast<const typename V::Packed*>(packed_bytes[t]);

  const uint8_t* bytes = matrix.weights + row_begin * matrix.cols * C::kBytesPerWeight;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const uint8_t* scale = C::kHasScales ? matrix.scales + r / kColumns * scale_row_bytes : nullptr;
    typename V::Acc row[kTokens];
    for (int t = 0; t < kTokens; ++t) row[t] = V::Zero();
    for (int64_t b = 0; b < whole; ++b) {
      for (int64_t line = 0; line < kBlockBytes; line += 64)
        __builtin_prefetch(bytes + kPrefetchBytes + line);
      AddBlock<V, C, kTokens>(bytes, scale, packed, b * kColumns, row);
      bytes += kBlockBytes;
      if constexpr (C::kHasScales) scale += sizeof(float);
    }
    if (tail_bytes != 0) {
      // Weight bits of zero are zero in every codec, and so are the activations packed for these columns.
      alignas(64) uint8_t tail[kBlockBytes] = {};
      __builtin_memcpy(tail, bytes, static_cast<size_t>(tail_bytes));
      AddBlock<V, C, kTokens>(tail, scale, packed, whole * kColumns, row);
      bytes += tail_bytes;
    }
    for (int t = 0; t < kTokens; ++t) out[t * out_stride + r - row_begin] = V::Sum(row[t]);
  }
}

template <typename V, typename C, int kTokens = V::kTile>
void ProjectUpTo(const Matrix& matrix, int64_t row_begin, int64_t row_end, const uint8_t* const* packed,
                 int64_t num_tokens, float* out, int64_t out_stride) {
  if constexpr (kTokens > 1) {
    if (num_tokens < kTokens) {
      return ProjectUpTo<V, C, kTokens - 1>(matrix, row_begin, row_end, packed, num_tokens, out, out_stride);
    }
  }
  ProjectTile<V, C, kTokens>(matrix, row_begin, row_end, packed, out, out_stride);
}

// An ISA with few registers has tiles smaller than kMaxTile.
template <typename V, typename C>
void Project(const Matrix& matrix, int64_t row_begin, int64_t row_end, const uint8_t* const* packed,
             int64_t num_tokens, float* out, int64_t out_stride) {
  for (int64_t t = 0; t < num_tokens; t += V::kTile) {
    const int64_t count = num_tokens - t < V::kTile ? num_tokens - t : V::kTile;
    ProjectUpTo<V, C>(matrix, row_begin, row_end, packed + t, count, out + t * out_stride, out_stride);
  }
}

template <typename V, typename C>
inline int64_t PackedPosition(int64_t column) {
  return column / V::kStep * V::kStep + C::template Position<V>(static_cast<int>(column % V::kStep));
}

template <typename V, typename C>
void Pack(const uint16_t* activations, int64_t begin, int64_t count, int64_t end, uint8_t* packed_bytes) {
  auto* packed = reinterpret_cast<typename V::Packed*>(packed_bytes);
  for (int64_t group = begin; group < end; group += kGroup) {
    auto* place = packed + PackedPosition<V, C>(group);
    for (int64_t j = 0; j < kGroup; ++j) {
      const int64_t i = group - begin + j;
      place[j] = i < count ? V::FromBf16(activations[i]) : typename V::Packed{};
    }
  }
}

template <typename V, typename C>
void DecodeAll(const uint8_t* bytes, int64_t count, float* out) {
  for (int64_t step = 0; step < count; step += V::kStep) {
    typename V::Operand weights[V::kOperands];
    typename V::Packed stored[V::kStep];
    C::template Decode<V>(bytes + step * C::kBytesPerWeight, weights);
    for (int i = 0; i < V::kOperands; ++i) V::Store(stored + i * (V::kStep / V::kOperands), weights[i]);
    for (int c = 0; c < V::kStep; ++c) {
      out[step + c] = V::ToFloat(stored[C::template Position<V>(c)]) * C::template kFactor<V>;
    }
  }
}

template <typename V, typename C>
constexpr CodecKernels KernelsOf() {
  static_assert(kColumns % V::kStep == 0 && V::kStep % kGroup == 0 && V::kTile <= kMaxTile);
  return {sizeof(typename V::Packed), Pack<V, C>, Project<V, C>, DecodeAll<V, C>};
}

template <typename V>
constexpr IsaKernels MakeKernels() {
  return {{KernelsOf<V, Bf16>(), KernelsOf<V, Fp8Block>()}, V::Read, MultiplyAdds<typename V::Dot>};
}

}  // namespace
}  // namespace hmoe
