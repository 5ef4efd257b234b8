// Activations as tiles want them: the tokens of a tile side by side, two successive columns of each together:
// [columns / 2, width, 2]. Behind a full tile the last one is filled up with zeros: a tile register's shape
// costs more to change.
#pragma once

#include "kernels/isa/amx/rows.h"
#include "kernels/isa/transpose512.h"

namespace hmoe {
namespace {

constexpr int64_t kChunk = 64;  // columns

// Which column of a chunk goes to each place.
template <typename C>
struct PackingOrder {
  alignas(64) uint16_t column[kChunk] = {};

  constexpr PackingOrder() {
    for (int c = 0; c < kChunk; ++c) column[PackedPosition<Tiles, C>(c)] = static_cast<uint16_t>(c);
  }
};
template <typename C>
constexpr PackingOrder<C> kPackingOrder;

// A chunk of one token as pairs in their order, `count` columns of which are there; the others become zeros.
struct Pairs {
  __m512i first, second;
};
template <typename C>
inline __attribute__((always_inline)) Pairs PairsOf(const uint16_t* chunk, int64_t count) {
  const uint64_t present = count >= kChunk ? ~uint64_t{0} : (uint64_t{1} << Larger(0, count)) - 1;
  const __m512i low = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(present), chunk);
  const __m512i high = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(present >> 32), chunk + 32);
  const uint16_t* order = kPackingOrder<C>.column;
  return {_mm512_permutex2var_epi16(low, _mm512_load_si512(order), high),
          _mm512_permutex2var_epi16(low, _mm512_load_si512(order + 32), high)};
}

// A chunk of all tokens of a tile that begins at column `c`; those beyond `tokens` become zeros.
template <typename C>
inline void PackChunk(const uint16_t* const* rows, int64_t c, int64_t count, int64_t tokens, uint16_t* to) {
  __m512i first[kTileTokens], second[kTileTokens];
  for (int64_t t = 0; t < kTileTokens; ++t) {
    const Pairs pairs = PairsOf<C>(rows[Smaller(t, tokens - 1)] + c, t < tokens ? count : 0);
    first[t] = pairs.first;
    second[t] = pairs.second;
  }
  Transpose(first);
  Transpose(second);
  for (int64_t i = 0; i < kTileTokens; ++i) {
    _mm512_storeu_si512(to + i * 2 * kTileTokens, first[i]);
    _mm512_storeu_si512(to + (i + kTileTokens) * 2 * kTileTokens, second[i]);
  }
}

// A chunk of a token in a tile that is `width` tokens wide.
template <typename C>
inline void PackChunkOfToken(const uint16_t* chunk, int64_t count, uint16_t* to, int64_t width) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(width)));
  const Pairs pairs = PairsOf<C>(chunk, count);
  if (width == 1) {
    _mm512_storeu_si512(to, pairs.first);
    _mm512_storeu_si512(to + 32, pairs.second);
  } else {
    _mm512_i32scatter_epi32(to, places, pairs.first, 2 * sizeof(uint16_t));
    _mm512_i32scatter_epi32(to + 32 * width, places, pairs.second, 2 * sizeof(uint16_t));
  }
}

template <typename C>
void PackTile(const uint16_t* const* rows, int64_t begin, int64_t count, int64_t end, int64_t tokens,
              int64_t width, uint16_t* tile) {
  const int64_t first_chunk = Smaller((begin + kChunk - 1) / kChunk * kChunk, end);
  const int64_t last_chunk = first_chunk + (end - first_chunk) / kChunk * kChunk;
  const auto put = [&](int64_t t, int64_t c) {
    const int64_t position = PackedPosition<Tiles, C>(c);
    const bool is_present = t < tokens && c < begin + count;
    tile[position / 2 * 2 * width + 2 * t + position % 2] = is_present ? rows[t][c - begin] : uint16_t{0};
  };
  for (int64_t t = 0; t < width; ++t) {
    for (int64_t c = begin; c < first_chunk; ++c) put(t, c);
    for (int64_t c = last_chunk; c < end; ++c) put(t, c);
  }
  for (int64_t c = first_chunk; c < last_chunk; c += kChunk) {
    const int64_t left = begin + count - c;
    if (width == kTileTokens) {
      PackChunk<C>(rows, c - begin, left, tokens, tile + c * width);
    } else {
      for (int64_t t = 0; t < width; ++t)
        PackChunkOfToken<C>(rows[t] + (c - begin), left, tile + c * width + 2 * t, width);
    }
  }
}

template <typename C>
void Pack(const uint16_t* const* rows, int64_t begin, int64_t count, int64_t end, const PackedTokens& to) {
  const int64_t width = Smaller(to.tokens, kTileTokens);
  for (int64_t first = 0; first < to.tokens; first += width) {
    PackTile<C>(rows + first, begin, count, end, Smaller(width, to.tokens - first), width,
                reinterpret_cast<uint16_t*>(to.data) + first * to.cols);
  }
}

}  // namespace
}  // namespace hmoe
