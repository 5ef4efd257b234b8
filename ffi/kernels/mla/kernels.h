// The kernels of table.h for any ISA `V`, a vocabulary of operations on sixteen floats (`Acc`) and on sixteen
// pairs of bfloat16 (`Pairs`).
//
// The order of additions is part of the contract ("same bits"): a sum runs over pairs of rows in ascending
// order; what it does not depend on is how many rows or columns are computed beside it.
#pragma once

#include <cstdint>

#include "kernels/mla/table.h"

namespace hmoe {
namespace {

// How far ahead of the walk over a matrix, in bytes: as in vector_projection.h.
constexpr int64_t kAhead = 4096;

template <typename V>
void Interleave(const uint16_t* rows, int64_t stride, int64_t count, int64_t cols, int64_t depth,
                uint16_t* tiles) {
  const int64_t whole = cols / kPanel * kPanel, tile_row = (cols + kPanel - 1) / kPanel * kTile;
  const uint16_t zeros[kPanel] = {};
  for (int64_t k = 0; k < depth; k += 2) {
    const uint16_t* even = rows + k * stride;
    uint16_t* to = tiles + k / kDepth * tile_row + k % kDepth * kPanel;
    for (int64_t c = 0; c < cols; c += kPanel, to += kTile) {
      uint16_t edge[2][kPanel] = {};
      const uint16_t* pair[2] = {k < count ? even + c : zeros, k + 1 < count ? even + stride + c : zeros};
      if (c % (2 * kPanel) == 0) {  // a cache line of each row
        __builtin_prefetch(reinterpret_cast<const char*>(even + c) + kAhead);
        __builtin_prefetch(reinterpret_cast<const char*>(even + stride + c) + kAhead);
      }
      if (c >= whole) {
        for (int i = 0; i < 2; ++i) {
          if (pair[i] == zeros) continue;
          __builtin_memcpy(edge[i], pair[i], static_cast<size_t>(cols - c) * sizeof(uint16_t));
          pair[i] = edge[i];
        }
      }
      V::ZipRows(pair[0], pair[1], to);
    }
  }
}

template <typename V, int kRows>
inline __attribute__((always_inline)) void ProductTile(const uint16_t* a, int64_t a_stride,
                                                       const uint16_t* tiles, int64_t tile_stride,
                                                       int64_t depth, float* c, int64_t row_stride) {
  typename V::Acc sum[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) sum[i] = V::Zero();
  for (int64_t begin = 0; begin < depth; begin += kDepth, tiles += tile_stride) {
    for (int64_t k = 0; k < kDepth; k += 2) {
      const auto b = V::LoadPairs(tiles + k * kPanel);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        uint32_t pair;
        __builtin_memcpy(&pair, a + i * a_stride + begin + k, sizeof pair);
        sum[i] = V::MultiplyAdd(V::BroadcastPair(pair), b, sum[i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) V::Store(c + i * row_stride, sum[i]);
}

template <typename V>
void Product(const uint16_t* a, int64_t a_stride, int64_t rows, const uint16_t* tiles, int64_t tile_stride,
             int64_t num_panels, int64_t depth, float* c, int64_t row_stride, int64_t panel_stride) {
  for (int64_t p = 0; p < num_panels; ++p) {
    const uint16_t* panel = tiles + p * kTile;
    float* to = c + p * panel_stride;
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8) {
      ProductTile<V, 8>(a + i * a_stride, a_stride, panel, tile_stride, depth, to + i * row_stride,
                        row_stride);
    }
    for (; i < rows; ++i) {
      ProductTile<V, 1>(a + i * a_stride, a_stride, panel, tile_stride, depth, to + i * row_stride,
                        row_stride);
    }
  }
}

// e^x: 2^n e^f with |f| <= ln(2) / 2 and the Taylor polynomial of degree 7, whose remainder is below 2^-26 of
// the result. What is below e^-87 becomes that, some 10^-38; NaN stays NaN.
template <typename V>
inline __attribute__((always_inline)) typename V::Acc Exp(typename V::Acc x) {
  // ln(2) in two parts, so that n times the first is exact.
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  x = V::Max(V::Set1(-87.0f), x);
  const auto n = V::Round(V::Mul(x, V::Set1(kLog2E)));
  const auto f = V::MultiplyAddFloats(n, V::Set1(-kLn2Low), V::MultiplyAddFloats(n, V::Set1(-kLn2High), x));
  constexpr float kTerms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  auto series = V::Set1(1.0f / 5040);
  for (const float term : kTerms) series = V::MultiplyAddFloats(series, f, V::Set1(term));
  return V::TimesPowerOf2(series, n);
}

template <typename V>
void Softmax(const float* scores, int64_t count, float scale, float* best, float* total, uint16_t* p,
             int64_t p_stride) {
  auto most = V::Load(scores);
  for (int64_t i = 1; i < count; ++i) most = V::Max(V::Load(scores + i * kPanel), most);
  const auto factor = V::Set1(scale);
  most = V::Mul(most, factor);
  auto sum = V::Zero();
  const auto weight = [&](int64_t i) {
    if (i >= count) return V::Zero();
    const auto share = Exp<V>(V::Sub(V::Mul(V::Load(scores + i * kPanel), factor), most));
    sum = V::Add(sum, share);
    return share;
  };
  for (int64_t i = 0; i < (count + kDepth - 1) / kDepth * kDepth; i += 2) {
    const auto even = weight(i);
    V::StoreRounded(even, weight(i + 1), p + i, p_stride);
  }
  V::Store(best, most);
  V::Store(total, sum);
}

template <typename V>
void InterleaveRounded(const float* rows, int64_t stride, int64_t depth, int64_t num_panels,
                       uint16_t* tiles) {
  for (int64_t k = 0; k < depth; k += 2) {
    const float* even = rows + k * stride;
    uint16_t* to = tiles + k / kDepth * num_panels * kTile + k % kDepth * kPanel;
    for (int64_t p = 0; p < num_panels; ++p)
      V::StoreRounded(V::Load(even + p * kPanel), V::Load(even + stride + p * kPanel), to + p * kTile, 2);
  }
}

template <typename V>
void SoftmaxRow(const float* scores, int64_t count, int64_t depth, float scale, float* best, float* total,
                uint16_t* p) {
  const int64_t whole = count / kPanel * kPanel;
  float edge[kPanel];
  for (int64_t i = 0; i < kPanel; ++i) edge[i] = whole + i < count ? scores[whole + i] : -__builtin_inff();
  auto most = V::Load(edge);
  for (int64_t i = 0; i < whole; i += kPanel) most = V::Max(V::Load(scores + i), most);
  float lanes[kPanel];
  V::Store(lanes, most);
  float largest = lanes[0];
  for (int64_t i = 1; i < kPanel; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  *best = largest * scale;

  const auto factor = V::Set1(scale), base = V::Set1(*best);
  auto sum = V::Zero();
  for (int64_t i = 0; i < whole; i += kPanel) {
    const auto share = Exp<V>(V::Sub(V::Mul(V::Load(scores + i), factor), base));
    sum = V::Add(sum, share);
    V::StoreBf16(share, p + i);
  }
  if (whole < count) {
    const auto share = Exp<V>(V::Sub(V::Mul(V::Load(edge), factor), base));
    V::Store(lanes, share);
    for (int64_t i = count - whole; i < kPanel; ++i) lanes[i] = 0;
    sum = V::Add(sum, V::Load(lanes));
    V::StoreBf16(V::Load(lanes), p + whole);
  }
  for (int64_t i = count; i < depth; ++i) p[i] = 0;
  *total = V::Sum(sum);
}

template <typename V>
void Combine(const float* parts, int64_t stride, const float* weights, int64_t num_parts, int64_t width,
             float* sum) {
  for (int64_t i = 0; i < width; i += kPanel) {
    auto acc = V::Zero();
    for (int64_t j = 0; j < num_parts; ++j)
      acc = V::MultiplyAddFloats(V::Load(parts + j * stride + i), V::Set1(weights[j]), acc);
    V::Store(sum + i, acc);
  }
}

template <typename V, int kTokens>
inline __attribute__((always_inline)) void DotRowsTile(const uint16_t* rows, int64_t num_rows, int64_t cols,
                                                       const uint16_t* x, int64_t x_stride, float* out,
                                                       int64_t out_stride) {
  const int64_t whole = cols / kDepth * kDepth;
  for (int64_t r = 0; r < num_rows; ++r) {
    const uint16_t* row = rows + r * cols;
    typename V::Acc sum[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sum[t] = V::Zero();
    for (int64_t k = 0; k < whole; k += kDepth) {
      __builtin_prefetch(reinterpret_cast<const char*>(row + k) + kAhead);
      const auto weights = V::LoadPairs(row + k);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t)
        sum[t] = V::MultiplyAdd(weights, V::LoadPairs(x + t * x_stride + k), sum[t]);
    }
    if (whole < cols) {
      uint16_t edge[kDepth] = {};
      __builtin_memcpy(edge, row + whole, static_cast<size_t>(cols - whole) * sizeof(uint16_t));
      const auto weights = V::LoadPairs(edge);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t)
        sum[t] = V::MultiplyAdd(weights, V::LoadPairs(x + t * x_stride + whole), sum[t]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) out[t * out_stride + r] = V::Sum(sum[t]);
  }
}

template <typename V>
void DotRows(const uint16_t* rows, int64_t num_rows, int64_t cols, const uint16_t* x, int64_t x_stride,
             int64_t num_tokens, float* out, int64_t out_stride) {
  int64_t t = 0;
  for (; t + 4 <= num_tokens; t += 4)
    DotRowsTile<V, 4>(rows, num_rows, cols, x + t * x_stride, x_stride, out + t * out_stride, out_stride);
  for (; t < num_tokens; ++t)
    DotRowsTile<V, 1>(rows, num_rows, cols, x + t * x_stride, x_stride, out + t * out_stride, out_stride);
}

template <typename V>
constexpr MlaKernels MakeMla() {
  return {1,          Interleave<V>, Product<V>, Softmax<V>, InterleaveRounded<V>, SoftmaxRow<V>,
          Combine<V>, DotRows<V>};
}

}  // namespace
}  // namespace hmoe
