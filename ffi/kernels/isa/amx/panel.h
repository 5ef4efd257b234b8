// Rows with more than 32 tokens, where multiplication is the limit: a block of a strip's columns is decoded
// once and multiplied with all tokens.
#pragma once

#include "kernels/isa/amx/sums.h"
#include "kernels/isa/transpose512.h"

namespace hmoe {
namespace {

// Passes over some columns of all rows, so that the activations of a pass stay in the second cache while all
// strips of rows use them; within a pass strip by strip, so that a strip's totals stay in the first while its
// blocks are added to them.
template <typename C>
class Panel {
 public:
  void Project(const Matrix& matrix, int64_t row_begin, int64_t row_end, const PackedTokens& tokens,
               float* out, int64_t out_stride, const uint8_t* next) {
    const TileUse use;
    products_.Clear();
    const int64_t num_pairs = (tokens.tokens + kPairTokens - 1) / kPairTokens;
    const int64_t blocks = tokens.cols / kColumns, pass = Larger(1, kPassBlocks / num_pairs);
    for (int64_t first = 0; first < blocks; first += pass) {
      const int64_t last = Smaller(first + pass, blocks), last_column = Smaller(last * kColumns, matrix.cols);
      const auto weights_at = [&](int64_t row, int64_t column) {
        return RowOf<C>(matrix, row).weights + column * C::kBits / 8;
      };
      const uint8_t* next_pass = last < blocks ? weights_at(row_begin, last_column) : next;
      for (int64_t row = row_begin; row < row_end; row += kStripRows) {
        const int64_t end = Smaller(row + kStripRows, row_end);
        const uint8_t* next_strip = end < row_end ? weights_at(end, first * kColumns) : next_pass;
        const Rows<C> rows(matrix, row, end, last_column, next_strip);
        TileSums* totals = totals_[(row - row_begin) / kStripRows];
        if (first == 0) __builtin_memset(totals, 0, static_cast<size_t>(num_pairs) * sizeof *totals);
        Multiply(rows, first, last, tokens, totals);
      }
    }
    for (int64_t row = row_begin; row < row_end; row += kTileRows)
      WriteRows(matrix, row_begin, row, Smaller(row + kTileRows, row_end), tokens.tokens, out, out_stride);
  }

 private:
  static constexpr int64_t kPairTokens = 2 * kTileTokens;

  // Blocks of a pass with one pair of tiles of tokens: a megabyte, half of the second cache of processors
  // with AMX. (Measured on 7168 columns: with half of that 64 tokens lose 3 to 11 %, with half as much again
  // 256 tokens lose 4 to 5 %.)
  static constexpr int64_t kPassBlocks = (int64_t{1} << 20) / (kPairTokens * kColumns * 2);

  // Adds the products of blocks [first, last) to the totals.
  void Multiply(const Rows<C>& rows, int64_t first, int64_t last, const PackedTokens& tokens,
                TileSums* totals) {
    windows_.Begin(rows, first);
    for (int64_t piece = 0; piece < kPieces; ++piece) Decode(rows, first, piece);
    for (int64_t block = first; block < last; ++block) {
      const bool is_last = block + 1 == last;
      if (!is_last) windows_.Advance(rows, block + 1);
      MultiplyBlock(rows, block, is_last ? 0 : kPieces, tokens, totals);
    }
    products_.template Finish<2, 2>();
  }

  // A block with all tokens; meanwhile, `pieces` of the next one are decoded.
  void MultiplyBlock(const Rows<C>& rows, int64_t block, int64_t pieces, const PackedTokens& tokens,
                     TileSums* totals) {
    const int64_t steps = (tokens.tokens + kPairTokens - 1) / kPairTokens * kSteps;
    const uint32_t* scales = windows_.Of(block).OfBlock(block);
    int64_t piece = 0, due = 0;
    const auto find = [&](int tile, int step) __attribute__((always_inline)) {
      return WeightTile{weights_[block % 2][tile] + step * kTileWeights, kTileStride};
    };
    const auto decode = [&](int) __attribute__((always_inline)) {
      for (due += pieces; due >= steps; due -= steps) Decode(rows, block + 1, piece++);
    };
    for (int64_t t = 0; t < tokens.tokens; t += kPairTokens, ++totals) {
      const TokenTiles tiles = TokenTiles::From(tokens, t).After(block * kColumns);
      if (!kScalesSums<C>) LoadTiles<2, 2>(*totals);
      if (tokens.tokens - t > kTileTokens) {
        products_.template MultiplyBlock<2, 2, 2>(find, tiles, scales, *totals, decode);
      } else {
        products_.template MultiplyBlock<2, 1, 2>(find, tiles, scales, *totals, decode);
      }
      if (!kScalesSums<C>) StoreTiles<2, 2>(*totals);
    }
  }

  // A piece of a block: a slice of a tile of rows.
  static constexpr int64_t kPieces = 2 * kSlices<C>;
  inline __attribute__((always_inline)) void Decode(const Rows<C>& rows, int64_t block, int64_t piece) {
    const int tile = static_cast<int>(piece % 2), slice = static_cast<int>(piece / 2);
    rows.template Decode<false, true>(tile, block, slice, windows_.Of(block),
                                      weights_[block % 2][tile] + slice * kStepsPerSlice<C> * kTileWeights);
  }

  // The totals of a tile of rows to the columns of `out`, which begin with row `row_begin`.
  void WriteRows(const Matrix& matrix, int64_t row_begin, int64_t row, int64_t end, int64_t num_tokens,
                 float* out, int64_t out_stride) const {
    const RowScales<C> scales(matrix, row, end);
    const auto present = static_cast<__mmask16>((1u << (end - row)) - 1);
    const int64_t strip = (row - row_begin) / kStripRows, tile = (row - row_begin) % kStripRows / kTileRows;
    for (int64_t first = 0; first < num_tokens; first += kTileTokens) {
      const float* totals = totals_[strip][first / kPairTokens][tile * 2 + first / kTileTokens % 2];
      __m512i x[kTileRows];  // a row of totals each, then a token's
      for (int64_t r = 0; r < kTileRows; ++r) x[r] = _mm512_load_si512(totals + r * kTileTokens);
      Transpose(x);
      for (int64_t t = 0; t < Smaller(kTileTokens, num_tokens - first); ++t) {
        _mm512_mask_storeu_ps(out + (first + t) * out_stride + row - row_begin, present,
                              _mm512_mul_ps(_mm512_castsi512_ps(x[t]), scales.Of(0)));
      }
    }
  }

  alignas(4096) uint16_t weights_[2][2][kSteps * kTileWeights];  // of two blocks
  Products<C> products_;
  ScaleWindows<C> windows_;
  alignas(4096) TileSums totals_[kMaxRows / kStripRows][kMaxTokens / kPairTokens];
};

}  // namespace
}  // namespace hmoe
