// Rows with up to 32 tokens, where memory is the limit: a strip of rows is walked from end to end.
#pragma once

#include "kernels/isa/amx/sums.h"

namespace hmoe {
namespace {

// Up to 16 rows with 16 tokens, or 32 with 32: one or two tiles of each. While the tiles work on a block of
// columns, the slices of it that they are done with make room for those of the next: the vector ports would
// be idle otherwise.
template <typename C>
class Strip {
 public:
  // With up to kTiles tiles of tokens.
  template <int kTiles>
  void Project(const Matrix& matrix, int64_t row_begin, int64_t row_end, const PackedTokens& tokens,
               float* out, int64_t out_stride, const uint8_t* next) {
    const TokenTiles tiles = TokenTiles::From(tokens, 0);
    const TileUse use(tiles.width);
    products_.Clear();
    for (int64_t row = row_begin; row < row_end; row += kTiles * kTileRows) {
      const int64_t end = Smaller(row + kTiles * kTileRows, row_end);
      const Rows<C> rows(matrix, row, end, matrix.cols, end < row_end ? RowOf<C>(matrix, end).weights : next);
      Multiply<kTiles>(rows, tiles);
      const RowScales<C> scales(matrix, row, end);
      for (int64_t t = 0; t < tokens.tokens; ++t)
        Write(scales, end - row, t, out + t * out_stride + row - row_begin);
    }
  }

 private:
  template <int kTiles>
  void Multiply(const Rows<C>& rows, TokenTiles tokens) {
    const auto decode = [&](int64_t block, int slice) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int tile = 0; tile < kTiles; ++tile) {
        rows.template Decode<kTiles == 1>(tile, block, slice, windows_.Of(block),
                                          weights_[tile] + slice * kStepsPerSlice<C> * kTileWeights);
      }
    };

    __builtin_memset(totals_, 0, sizeof totals_);
    windows_.Begin(rows, 0);
#pragma GCC unroll 4
    for (int slice = 0; slice < kSlices<C>; ++slice) decode(0, slice);
    ZeroTiles<kTiles, kTiles>();
    const int64_t blocks = rows.blocks();
    for (int64_t block = 0; block < blocks; ++block, tokens = tokens.After(kColumns)) {
      const bool is_last = block + 1 == blocks;
      if (!is_last) windows_.Advance(rows, block + 1);
      products_.template MultiplyBlock<kTiles, kTiles>(
          [&](int tile, int step) __attribute__((always_inline)) {
            return rows.Find(tile, block, step, weights_[tile] + step * kTileWeights);
          },
          tokens, windows_.Of(block).OfBlock(block), totals_,
          [&](int step) __attribute__((always_inline)) {
            if ((step + 1) % kStepsPerSlice<C> == 0 && !is_last) decode(block + 1, step / kStepsPerSlice<C>);
          });
    }
    products_.template Finish<kTiles, kTiles>();
    if (!kScalesSums<C>) StoreTiles<kTiles, kTiles>(totals_);
  }

  // The totals of a token to out[0 .. num_rows).
  void Write(const RowScales<C>& scales, int64_t num_rows, int64_t token, float* out) const {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_slli_epi32(lanes, 4);
    static_assert(kTileTokens == 1 << 4);
    for (int64_t row = 0; row < num_rows; row += kTileRows) {
      const auto present = static_cast<__mmask16>((1u << Smaller(kTileRows, num_rows - row)) - 1);
      const float* sums = totals_[row / kTileRows * 2 + token / kTileTokens] + token % kTileTokens;
      const __m512 scaled = _mm512_mul_ps(_mm512_i32gather_ps(places, sums, sizeof(float)), scales.Of(row));
      _mm512_mask_storeu_ps(out + row, present, scaled);
    }
  }

  // Of a slice, only the same slice of the other rows lies a multiple of 4 KB away: loads of other slices
  // would be held up by stores to such addresses.
  alignas(64) uint16_t weights_[2][kSteps * kTileWeights];
  alignas(64) TileSums totals_;
  Products<C> products_;
  ScaleWindows<C> windows_;
};

}  // namespace
}  // namespace hmoe
