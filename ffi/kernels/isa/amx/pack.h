// Activations as tiles want them: the tokens of a tile side by side, two successive columns of each together:
// [columns / 2, width, 2]. Behind a full tile the last one is filled up with zeros: a tile register's shape
// costs more to change.
#pragma once

#include "kernels/isa/amx/rows.h"

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

// A chunk of one token, `count` of which are there; the others become zeros.
template <typename C>
inline void PackChunk(const uint16_t* from, int64_t count, uint16_t* to, int64_t width) {
  const uint64_t present = count >= kChunk ? ~uint64_t{0} : (uint64_t{1} << (count > 0 ? count : 0)) - 1;
  const __m512i low = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(present), from);
  const __m512i high = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(present >> 32), from + 32);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(width)));
  for (int half = 0; half < 2; ++half) {
    const __m512i order = _mm512_load_si512(kPackingOrder<C>.column + 32 * half);
    const __m512i pairs = _mm512_permutex2var_epi16(low, order, high);
    uint16_t* place = to + 32 * half * width;
    if (width == 1) {
      _mm512_storeu_si512(place, pairs);
    } else {
      _mm512_i32scatter_epi32(place, places, pairs, 2 * sizeof(uint16_t));
    }
  }
}

template <typename C>
void Pack(const uint16_t* const* rows, int64_t begin, int64_t count, int64_t end, const PackedTokens& to) {
  const int64_t width = Smaller(to.tokens, kTileTokens);
  const int64_t first_chunk = Smaller((begin + kChunk - 1) / kChunk * kChunk, end);
  const int64_t last_chunk = first_chunk + (end - first_chunk) / kChunk * kChunk;
  for (int64_t first = 0; first < to.tokens; first += width) {
    auto* tile = reinterpret_cast<uint16_t*>(to.data) + first * to.cols;
    for (int64_t t = 0; t < width; ++t) {
      const bool is_there = first + t < to.tokens;
      const uint16_t* row = rows[is_there ? first + t : first];
      const auto put = [&](int64_t c) {
        const int64_t position = PackedPosition<Tiles, C>(c);
        const bool is_present = is_there && c < begin + count;
        tile[position / 2 * 2 * width + 2 * t + position % 2] = is_present ? row[c - begin] : uint16_t{0};
      };
      for (int64_t c = begin; c < first_chunk; ++c) put(c);
      for (int64_t c = first_chunk; c < last_chunk; c += kChunk) {
        PackChunk<C>(row + (c - begin), is_there ? begin + count - c : 0, tile + c * width + 2 * t, width);
      }
      for (int64_t c = last_chunk; c < end; ++c) put(c);
    }
  }
}

}  // namespace
}  // namespace hmoe
