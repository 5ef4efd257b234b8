// Rows of a matrix times packed tokens with vector instructions, for any ISA `V` and any codec `C`.
//
// `V` is a small vocabulary of vector operations, one file each in kernels/isa. `C` says how stored bytes
// become operands, in terms of that vocabulary (codec/scaling.h). Neither knows the other, so a format is one
// file, and an ISA one here and one for latent attention (kernels/mla).
//
// The order of additions is part of the contract ("same bits"): the columns of a unit are summed into a fresh
// accumulator, that is scaled and added to the row's, and the row's lanes are added up at the end. Units do
// not depend on each other, so the processor overlaps them and a single accumulator per token hides the
// latency.
//
// Two ways lead there. *Direct*: a weight is decoded in registers and used for a few tokens at once; right
// while memory is the limit. *Panel*: a few rows are decoded once into the cache, and multiplied from there
// with all tokens in register blocks; right where multiplication is the limit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/codecs.h"

namespace hmoe {
namespace {

// How far ahead of the walk. A Zen 5 and an Emerald Rapids machine read best with 2-8 KB.
constexpr int64_t kPrefetchBytes = 4096;

// Of one call. Their activations, a megabyte of DeepSeek-V3's width, stay in the second cache while panel
// after panel of rows passes over them.
constexpr int64_t kVectorTokens = 64;

// Columns that share one accumulator before scaling. The lanes of a group codec's accumulator belong to
// different groups, and one vector of scales serves them all.
template <typename V, typename C>
constexpr int64_t kUnit = IsGroup(C::kScaling) ? V::kNibbleStep : 128;

template <typename V, typename C>
constexpr int64_t kUnitBytes = kUnit<V, C> * C::kBits / 8;

template <typename V, typename C>
constexpr int kUnitOperands = kUnit<V, C> / V::kWidth;

template <typename C>
constexpr bool kScaled = C::kScaling != Scaling::kNone && C::kScaling != Scaling::kRow;

// The scales of a unit, lane by lane.
template <typename V, typename C>
inline __attribute__((always_inline)) typename V::Acc UnitScale(const uint8_t* scales, int64_t unit) {
  if constexpr (C::kScaling == Scaling::kBlock) {
    float scale;
    __builtin_memcpy(&scale, scales + 4 * unit, sizeof scale);
    return V::Broadcast(scale * C::template kFactor<V>);
  } else if constexpr (IsGroup(C::kScaling)) {
    constexpr int kCount = kUnit<V, C> < C::kGroup ? 1 : static_cast<int>(kUnit<V, C> / C::kGroup);
    const uint8_t* first = scales + unit * kUnit<V, C> / C::kGroup * BytesOfScale(C::kScaling);
    if constexpr (C::kScaling == Scaling::kGroupBf16) {
      return V::template SpreadBf16<kCount>(first);
    } else {
      return V::template SpreadE8M0<kCount>(first);
    }
  } else {
    return V::Zero();
  }
}

template <typename V, bool kHasScale>
inline __attribute__((always_inline)) typename V::Acc AddUnit(typename V::Acc unit, typename V::Acc scale,
                                                              typename V::Acc row) {
  if constexpr (kHasScale) return V::MultiplyAddFloats(unit, scale, row);
  return V::Add(unit, row);
}

// The last unit of a row that ends inside it: copies, so that nothing beyond the row is read. Activations
// packed for the columns beyond are zero, and so are these scales.
template <typename V, typename C>
struct Tail {
  alignas(64) uint8_t weights[kUnitBytes<V, C>] = {};
  uint8_t scales[16] = {};
  int64_t columns;

  Tail(const Matrix& matrix, const Row& row) : columns(matrix.cols % kUnit<V, C>) {
    const int64_t unit = matrix.cols / kUnit<V, C>;
    __builtin_memcpy(weights, row.weights + unit * kUnitBytes<V, C>,
                     static_cast<size_t>(columns * C::kBits / 8));
    if constexpr (kScaled<C>) {
      const int64_t before = ScaleBytesPerRow<C>(unit * kUnit<V, C>);
      __builtin_memcpy(scales, row.scales + before,
                       static_cast<size_t>(ScaleBytesPerRow<C>(matrix.cols) - before));
    }
  }
};

template <typename V, typename C>
inline __attribute__((always_inline)) void DecodeUnit(const uint8_t* bytes, typename V::Operand* out) {
  constexpr int64_t kStep = C::template kStep<V>;
#pragma GCC unroll 16
  for (int64_t step = 0; step < kUnit<V, C>; step += kStep) {
    C::template Decode<V>(bytes + step * C::kBits / 8, out + step / V::kWidth);
  }
}

template <typename V, typename C, int kTokens>
inline __attribute__((always_inline)) void MultiplyUnit(const uint8_t* bytes, typename V::Acc scale,
                                                        const typename V::Packed* const* packed,
                                                        int64_t column, typename V::Acc* row) {
  constexpr int kStep = C::template kStep<V>;
  typename V::Acc unit[kTokens];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) unit[t] = V::Zero();
#pragma GCC unroll 16
  for (int step = 0; step < kUnit<V, C>; step += kStep) {
    typename V::Operand weights[kStep / V::kWidth];
    C::template Decode<V>(bytes + step * C::kBits / 8, weights);
#pragma GCC unroll 8
    for (int i = 0; i < kStep / V::kWidth; ++i) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        unit[t] = V::MultiplyAdd(weights[i], V::Load(packed[t] + column + step + i * V::kWidth), unit[t]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) row[t] = AddUnit<V, kScaled<C>>(unit[t], scale, row[t]);
}

template <typename V, typename C, int kTokens>
void ProjectDirect(const Matrix& matrix, int64_t row_begin, int64_t row_end,
                   const typename V::Packed* const* packed, int64_t num_tokens, float* out,
                   int64_t out_stride) {
  const int64_t whole = matrix.cols / kUnit<V, C>;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const Row from = RowOf<C>(matrix, r);
    const uint8_t* bytes = from.weights;
    typename V::Acc row[kTokens];
    for (int t = 0; t < kTokens; ++t) row[t] = V::Zero();
    for (int64_t u = 0; u < whole; ++u) {
      for (int64_t line = 0; line < kUnitBytes<V, C>; line += 64)
        __builtin_prefetch(bytes + kPrefetchBytes + line);
      MultiplyUnit<V, C, kTokens>(bytes, UnitScale<V, C>(from.scales, u), packed, u * kUnit<V, C>, row);
      bytes += kUnitBytes<V, C>;
    }
    if (matrix.cols % kUnit<V, C> != 0) {
      const Tail<V, C> tail(matrix, from);
      MultiplyUnit<V, C, kTokens>(tail.weights, UnitScale<V, C>(tail.scales, 0), packed, whole * kUnit<V, C>,
                                  row);
    }
    const float scale =
        RowScale<C>(matrix, r / matrix.rows_per_scale) * (kScaled<C> ? 1 : C::template kFactor<V>);
    for (int t = 0; t < kTokens; ++t) {
      if (t < num_tokens) out[t * out_stride + r - row_begin] = V::Sum(row[t]) * scale;
    }
  }
}

// Three tokens are done as four, and five to seven as eight: fewer functions, and no slower while memory is
// the limit.
template <typename V, typename C, int kTokens = V::kTile>
void ProjectTile(const Matrix& matrix, int64_t row_begin, int64_t row_end,
                 const typename V::Packed* const* packed, int64_t num_tokens, float* out,
                 int64_t out_stride) {
  if constexpr (kTokens > 1) {
    if (num_tokens <= kTokens / 2) {
      return ProjectTile<V, C, kTokens / 2>(matrix, row_begin, row_end, packed, num_tokens, out, out_stride);
    }
  }
  ProjectDirect<V, C, kTokens>(matrix, row_begin, row_end, packed, num_tokens, out, out_stride);
}

// A panel of decoded rows and the sums that belong to it. Its columns are few enough that it stays in a
// 32 KB cache while all tokens pass over it.
constexpr int64_t kPanelRows = 8, kPanelBytes = 16 * 1024;

template <typename V>
constexpr int64_t kPanelColumns = kPanelBytes / kPanelRows / static_cast<int64_t>(sizeof(typename V::Packed));

// kRows x kTokens sums over the columns of a panel, in registers.
template <typename V, bool kHasScale, int kOperands, int kRows, int kTokens>
void MultiplyBlock(const typename V::Packed* panel, const typename V::Acc* scales, int64_t units,
                   int64_t max_units, const typename V::Packed* const* packed, typename V::Acc* sums,
                   int64_t sums_stride) {
  typename V::Acc row[kRows][kTokens];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) row[r][t] = sums[r * sums_stride + t];
  }
  for (int64_t u = 0; u < units; ++u) {
    typename V::Acc unit[kRows][kTokens];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) unit[r][t] = V::Zero();
    }
    for (int i = 0; i < kOperands; ++i) {
      const int64_t column = (u * kOperands + i) * V::kWidth;
      typename V::Operand x[kTokens];
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) x[t] = V::Load(packed[t] + column);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const typename V::Operand w = V::Load(panel + r * kPanelColumns<V> + column);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) unit[r][t] = V::MultiplyAdd(w, x[t], unit[r][t]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        row[r][t] = AddUnit<V, kHasScale>(unit[r][t], scales[r * max_units + u], row[r][t]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sums[r * sums_stride + t] = row[r][t];
  }
}

template <typename V, bool kHasScale, int kOperands, int kRows, int kTokens = V::kBlockTokens>
void MultiplyTokens(const typename V::Packed* panel, const typename V::Acc* scales, int64_t units,
                    int64_t max_units, const typename V::Packed* const* packed, int64_t num_tokens,
                    typename V::Acc* sums, int64_t sums_stride) {
  int64_t t = 0;
  for (; t + kTokens <= num_tokens; t += kTokens) {
    MultiplyBlock<V, kHasScale, kOperands, kRows, kTokens>(panel, scales, units, max_units, packed + t,
                                                           sums + t, sums_stride);
  }
  if constexpr (kTokens > 1) {
    if (t < num_tokens) {
      MultiplyTokens<V, kHasScale, kOperands, kRows, kTokens - 1>(panel, scales, units, max_units, packed + t,
                                                                  num_tokens - t, sums + t, sums_stride);
    }
  }
}

template <typename V, bool kHasScale, int kOperands>
void MultiplyPanel(const typename V::Packed* panel, const typename V::Acc* scales, int64_t num_rows,
                   int64_t units, int64_t max_units, const typename V::Packed* const* packed,
                   int64_t num_tokens, typename V::Acc* sums) {
  int64_t r = 0;
  for (; r + V::kBlockRows <= num_rows; r += V::kBlockRows) {
    MultiplyTokens<V, kHasScale, kOperands, V::kBlockRows>(panel + r * kPanelColumns<V>,
                                                           scales + r * max_units, units, max_units, packed,
                                                           num_tokens, sums + r * num_tokens, num_tokens);
  }
  for (; r < num_rows; ++r) {
    MultiplyTokens<V, kHasScale, kOperands, 1>(panel + r * kPanelColumns<V>, scales + r * max_units, units,
                                               max_units, packed, num_tokens, sums + r * num_tokens,
                                               num_tokens);
  }
}

template <typename V, typename C>
struct Panel {
  static constexpr int64_t kUnits = kPanelColumns<V> / kUnit<V, C>;

  alignas(64) typename V::Packed weights[kPanelRows * kPanelColumns<V>];
  typename V::Acc scales[kPanelRows * kUnits];
  typename V::Acc sums[kPanelRows * kVectorTokens];

  // Units [first, first + units) of a row, the last of which may be a tail.
  void Decode(const Matrix& matrix, int64_t row, int64_t place, int64_t first, int64_t units) {
    const Row from = RowOf<C>(matrix, row);
    for (int64_t u = 0; u < units; ++u) {
      typename V::Operand decoded[kUnitOperands<V, C>];
      if ((first + u + 1) * kUnit<V, C> <= matrix.cols) {
        const uint8_t* bytes = from.weights + (first + u) * kUnitBytes<V, C>;
        __builtin_prefetch(bytes + kPanelColumns<V> * C::kBits / 8);
        DecodeUnit<V, C>(bytes, decoded);
        scales[place * kUnits + u] = UnitScale<V, C>(from.scales, first + u);
      } else {
        const Tail<V, C> tail(matrix, from);
        DecodeUnit<V, C>(tail.weights, decoded);
        scales[place * kUnits + u] = UnitScale<V, C>(tail.scales, 0);
      }
      typename V::Packed* to = weights + place * kPanelColumns<V> + u * kUnit<V, C>;
      for (int i = 0; i < kUnitOperands<V, C>; ++i) V::Store(to + i * V::kWidth, decoded[i]);
    }
  }
};

template <typename V, typename C>
void ProjectPanel(const Matrix& matrix, int64_t row_begin, int64_t row_end,
                  const typename V::Packed* const* packed, int64_t num_tokens, float* out, int64_t out_stride,
                  uint8_t* workspace) {
  using PanelOf = Panel<V, C>;
  static_assert(sizeof(PanelOf) <= kWorkspaceBytes && kPanelColumns<V> % kUnit<V, C> == 0);
  auto* panel = reinterpret_cast<PanelOf*>(workspace);
  const int64_t all_units = (matrix.cols + kUnit<V, C> - 1) / kUnit<V, C>;
  for (int64_t row = row_begin; row < row_end; row += kPanelRows) {
    const int64_t num_rows = row_end - row < kPanelRows ? row_end - row : kPanelRows;
    for (int64_t i = 0; i < num_rows * num_tokens; ++i) panel->sums[i] = V::Zero();
    for (int64_t first = 0; first < all_units; first += PanelOf::kUnits) {
      const int64_t units = all_units - first < PanelOf::kUnits ? all_units - first : PanelOf::kUnits;
      for (int64_t r = 0; r < num_rows; ++r) panel->Decode(matrix, row + r, r, first, units);
      const typename V::Packed* here[kVectorTokens];
      for (int64_t t = 0; t < num_tokens; ++t) here[t] = packed[t] + first * kUnit<V, C>;
      MultiplyPanel<V, kScaled<C>, kUnitOperands<V, C>>(panel->weights, panel->scales, num_rows, units,
                                                        PanelOf::kUnits, here, num_tokens, panel->sums);
    }
    for (int64_t r = 0; r < num_rows; ++r) {
      const float scale =
          RowScale<C>(matrix, (row + r) / matrix.rows_per_scale) * (kScaled<C> ? 1 : C::template kFactor<V>);
      for (int64_t t = 0; t < num_tokens; ++t) {
        out[t * out_stride + row + r - row_begin] = V::Sum(panel->sums[r * num_tokens + t]) * scale;
      }
    }
  }
}

// From how many tokens on the panel is faster, in cycles per operand of a row, for a core that loads two
// vectors per cycle from the first cache and one from the second. Direct multiplication loads one activation
// per product, out of the second cache (eight tokens of 7168 columns do not fit the first); and decodes again
// for every tile of tokens. The panel is stored once, and a block of rows and tokens shares its loads.
template <typename V, typename C>
constexpr int64_t FirstPanelTokens() {
  constexpr double kStore = 1, kDecode = C::kBits == 16 ? 0.5 : 1.5;  // a load, or look-ups and shifts too
  constexpr double kFromSecond = V::kMultiplyCycles > 1 ? V::kMultiplyCycles : 1;
  constexpr double kBlockLoads = 0.5 * (V::kBlockRows + V::kBlockTokens) / (V::kBlockRows * V::kBlockTokens);
  constexpr double kFromBlock = V::kMultiplyCycles > kBlockLoads ? V::kMultiplyCycles : kBlockLoads;
  for (int64_t tokens = 1; tokens < kVectorTokens; ++tokens) {
    const auto tiles = static_cast<double>((tokens + V::kTile - 1) / V::kTile);
    const auto count = static_cast<double>(tokens);
    if (tiles * kDecode + count * kFromSecond > kDecode + kStore + count * kFromBlock) return tokens;
  }
  return kVectorTokens;
}

template <typename V, typename C>
void Project(const Matrix& matrix, int64_t row_begin, int64_t row_end, const PackedTokens& tokens, float* out,
             int64_t out_stride, const uint8_t* /*next*/, uint8_t* workspace) {
  const typename V::Packed* packed[kVectorTokens + V::kTile];
  for (int64_t t = 0; t < tokens.tokens + V::kTile; ++t) {  // a tile that is not full repeats the last token
    const int64_t token = t < tokens.tokens ? t : tokens.tokens - 1;
    packed[t] = reinterpret_cast<const typename V::Packed*>(tokens.data) + token * tokens.cols;
  }
  if (tokens.tokens >= FirstPanelTokens<V, C>()) {
    return ProjectPanel<V, C>(matrix, row_begin, row_end, packed, tokens.tokens, out, out_stride, workspace);
  }
  for (int64_t t = 0; t < tokens.tokens; t += V::kTile) {
    const int64_t count = tokens.tokens - t < V::kTile ? tokens.tokens - t : V::kTile;
    ProjectTile<V, C>(matrix, row_begin, row_end, packed + t, count, out + t * out_stride, out_stride);
  }
}

template <typename V, typename C>
void Pack(const uint16_t* const* rows, int64_t begin, int64_t count, int64_t end, const PackedTokens& to) {
  for (int64_t t = 0; t < to.tokens; ++t) {
    auto* packed = reinterpret_cast<typename V::Packed*>(to.data) + t * to.cols;
    for (int64_t i = 0; i < count; ++i) packed[PackedPosition<V, C>(begin + i)] = V::FromBf16(rows[t][i]);
    for (int64_t c = begin + count; c < end; ++c) packed[PackedPosition<V, C>(c)] = {};
  }
}

template <typename V>
struct VectorKernels {
  template <typename C>
  struct Of {
    static constexpr CodecKernels Make() {
      static_assert(kUnit<V, C> % C::template kStep<V> == 0 && C::template kStep<V> % V::kWidth == 0);
      return {sizeof(typename V::Packed), 1, kVectorTokens, Pack<V, C>, Project<V, C>, DecodeAll<V, C>};
    }
  };
  static constexpr IsaKernels Make() { return MakeIsaKernels<Of>(V::Read, MultiplyAdds<typename V::Dot>); }
};

}  // namespace
}  // namespace hmoe
