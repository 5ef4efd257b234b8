// Rows with more tokens than that, where multiplication is the limit: a block of a strip's columns is decoded
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
    __builtin_memset(weights_, 0, sizeof weights_);  // of rows that are not there
    const int64_t num_pairs = (tokens.tokens + kPairTokens - 1) / kPairTokens;
    const int64_t blocks = tokens.cols / kColumns, pass = Larger(1, kPassBlocks / num_pairs);
    for (int64_t first = 0; first < blocks; first += pass) {
      for (int64_t row = row_begin; row < row_end; row += kStripRows) {
        const int64_t end = Smaller(row + kStripRows, row_end);
        const Rows<C> rows(matrix, row, end, end < row_end ? RowOf<C>(matrix, end).weights : next);
        TileSums* totals = totals_[(row - row_begin) / kStripRows];
        if (first == 0) __builtin_memset(totals, 0, static_cast<size_t>(num_pairs) * sizeof *totals);
        Multiply(rows, first, Smaller(first + pass, blocks), tokens, totals);
      }
    }
    for (int64_t row = row_begin; row < row_end; row += kTileRows) {
      const int64_t end = Smaller(row + kTileRows, row_end), from_begin = row - row_begin;
      const RowScales<C> scales(matrix, row, end);
      for (int64_t t = 0; t < tokens.tokens; t += kTileTokens) {
        const int64_t tile = from_begin % kStripRows / kTileRows * 2 + t % kPairTokens / kTileTokens;
        Write(totals_[from_begin / kStripRows][t / kPairTokens][tile], scales, end - row,
              Smaller(kTileTokens, tokens.tokens - t), out + t * out_stride + from_begin, out_stride);
      }
    }
  }

 private:
  static constexpr int64_t kPairTokens = 2 * kTileTokens;

  // Blocks of a pass with one pair of tiles of tokens: a megabyte, half of the second cache of processors
  // with AMX. (Measured with 64 and 256 tokens of 7168 columns: half of that loses a tenth, as much again a
  // few per cent.)
  static constexpr int64_t kPassBlocks = (int64_t{1} << 20) / (kPairTokens * kColumns * 2);

  // Adds the products of blocks [first, last) to the totals.
  void Multiply(const Rows<C>& rows, int64_t first, int64_t last, const PackedTokens& tokens,
                TileSums* totals) {
    const auto read_scales = [&](int64_t block) {
      if (kScalesPerBlock<C> == 0 || (block != first && block % kBlocksPerWindow<C> != 0)) return;
      const int64_t window = block / kBlocksPerWindow<C>;
      rows.ReadScales(window, &windows_[window % 2]);
    };
    read_scales(first);
    for (int64_t piece = 0; piece < kPieces; ++piece) Decode(rows, first, piece);
    for (int64_t block = first; block < last; ++block) {
      const bool is_last = block + 1 == last;
      if (!is_last) read_scales(block + 1);
      MultiplyBlock(rows, block, is_last ? 0 : kPieces, tokens, totals);
    }
    products_.template Finish<2, 2>();
  }

  // A block with all tokens; meanwhile, `pieces` of the next one are decoded.
  void MultiplyBlock(const Rows<C>& rows, int64_t block, int64_t pieces, const PackedTokens& tokens,
                     TileSums* totals) {
    const int64_t steps = (tokens.tokens + kPairTokens - 1) / kPairTokens * kSteps;
    const uint32_t* scales = windows_[block / kBlocksPerWindow<C> % 2].OfBlock(block);
    int64_t piece = 0, due = 0;
    const auto find = [&](int tile, int step) __attribute__((always_inline)) {
      return WeightTile{weights_[block % 2][tile] + step * kTileWeights, kTileStride};
    };
    const auto decode = [&](int) __attribute__((always_inline)) {
      for (due += pieces; due >= steps; due -= steps) Decode(rows, block + 1, piece++);
    };
    for (int64_t t = 0; t < tokens.tokens; t += kPairTokens, ++totals) {
      const auto* left = reinterpret_cast<const uint16_t*>(tokens.data) + t * tokens.cols;
      const TokenTiles all{left, left + kTileTokens * tokens.cols, kTileTokens};
      const TokenTiles tiles = all.After(block * kColumns);
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
    rows.template Decode<false, true>(tile, block, slice, windows_[block / kBlocksPerWindow<C> % 2],
                                      weights_[block % 2][tile] + slice * kStepsPerSlice<C> * kTileWeights);
  }

  // Totals of 16 rows with 16 tokens to rows of `out`.
  static void Write(const float* totals, const RowScales<C>& scales, int64_t num_rows, int64_t num_tokens,
                    float* out, int64_t out_stride) {
    __m512i rows[kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r) rows[r] = _mm512_load_si512(totals + r * kTileTokens);
    Transpose(rows);
    const auto present = static_cast<__mmask16>((1u << num_rows) - 1);
    for (int64_t t = 0; t < num_tokens; ++t) {
      const __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(rows[t]), scales.Of(0));
      _mm512_mask_storeu_ps(out + t * out_stride, present, scaled);
    }
  }

  alignas(4096) uint16_t weights_[2][2][kSteps * kTileWeights];  // of two blocks
  Products<C> products_;
  ScaleWindow<C> windows_[2];
  alignas(4096) TileSums totals_[kMaxRows / kStripRows][kMaxTokens / kPairTokens];
};

}  // namespace
}  // namespace hmoe
