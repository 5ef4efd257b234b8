// AMX-BF16: products of tiles, 16 rows of weights x 32 columns with up to 16 tokens.
//
// A tile product takes as long for one token as for sixteen, and a weight is decoded once for all of them, so
// tiles serve every number of tokens: that keeps a token's bits the same in every batch.
//
// Order of additions: the processor adds the even and the odd columns of 32 apart, then both to the tile (all
// rounded to nearest, subnormals as zero). Where a scale belongs to a whole row, or is folded into the
// decoded weights, the tile keeps the sum for the whole row. Elsewhere the sum is taken out after each block
// or group, scaled, and added to the row's total in FP32.

#include <immintrin.h>

#include "kernels/codecs.h"
#include "kernels/isa/avx512_bf16.h"
#include "kernels/isa/dot_peak.h"
#include "kernels/isa/tiles.h"

namespace hmoe {
namespace {

constexpr int64_t kTileRows = 16, kTileTokens = 16, kTileColumns = 32;
constexpr int64_t kTileFloats = kTileRows * kTileTokens, kTileWeights = kTileRows * kTileColumns;
constexpr int64_t kTileStride = 64;            // bytes between the rows of a tile
constexpr int64_t kColumns = 128, kHalf = 64;  // of a block; half of them are decoded at once
constexpr int kSteps = kColumns / kTileColumns;

// How 32 columns of a row become a row of a weight tile.
struct Tiles : Avx512Bf16 {
  static constexpr int kNibbleStep = 32;

  static Operand Table(const NibbleTable& table) { return _mm512_load_si512(table.bf16); }
  // Each quarter of the register takes the same 16 bytes, shifted so that another of a word's four weights
  // comes to its low bits: the operand holds 32 successive columns, one group's.
  static Operand LookUpGroup(Operand table, const uint8_t* bytes) {
    constexpr long long kFour = 0x0004000400040004;
    const __m512i shifts = _mm512_setr_epi64(0, 0, kFour, kFour, 2 * kFour, 2 * kFour, 3 * kFour, 3 * kFour);
    const __m512i words = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, shifts), table);
  }
  static void LookUpNibbles(const NibbleTable& table, const uint8_t* bytes, Operand* out) {
    out[0] = LookUpGroup(Table(table), bytes);
  }
  static constexpr int NibblePosition(int column) { return column % 4 * 8 + column / 4; }
};

// Whether sums of a part of a row are scaled, each by a scale of its own.
template <typename C>
constexpr bool kScalesSums = C::kScaling == Scaling::kBlock || C::kScaling == Scaling::kGroupBf16;

// Tile products of one such sum; otherwise of a block.
template <typename C>
constexpr int kStepsPerSum =
    C::kScaling == Scaling::kGroupBf16 ? ColumnsPerScale<C>() / kTileColumns : kSteps;

// Such sums, and their scales, per block of columns.
template <typename C>
constexpr int kSumsPerBlock = kSteps / kStepsPerSum<C>;

constexpr int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t RoundUpDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// MXFP4 with its power of two, which goes into the exponents of the table's entries. Only what would leave
// the normal numbers is computed one by one: E2M1 itself uses the exponents 126 to 129.
inline void DecodeMxfp4(const uint8_t* bytes, unsigned exponent, uint16_t* to) {
  if (exponent - 2 <= 250) {
    constexpr __mmask32 kNotZero = 0xfefefefe;
    const __m512i table = Tiles::Table(kE2M1Table);
    const __m512i power = _mm512_set1_epi16(static_cast<short>((static_cast<int>(exponent) - 127) * 128));
    return Tiles::Store(to, Tiles::LookUpGroup(_mm512_mask_add_epi16(table, kNotZero, table, power), bytes));
  }
  for (int column = 0; column < kTileColumns; ++column) {
    const float value = FloatFromE2M1(bytes[column / 2] >> (column % 2 * 4) & 15);
    to[Tiles::NibblePosition(column)] = Bf16FromFloat(value * FloatFromE8M0(exponent));
  }
}

// Half a block of columns of a row becomes a row of two weight tiles, the first at `to`, the second behind
// it. `scales` are those of MXFP4's groups here.
template <typename C>
inline __attribute__((always_inline)) void DecodeHalf(const uint8_t* bytes, const uint8_t* scales,
                                                      uint16_t* to) {
  if constexpr (C::kScaling == Scaling::kGroupE8M0) {
    DecodeMxfp4(bytes, scales[0], to);
    DecodeMxfp4(bytes + 16, scales[1], to + kTileWeights);
  } else {
    constexpr int kStep = C::template kStep<Tiles>;
#pragma GCC unroll 2
    for (int column = 0; column < kHalf; column += kStep) {
      __m512i decoded[kStep / kTileColumns];
      C::template Decode<Tiles>(bytes + column * C::kBits / 8, decoded);
#pragma GCC unroll 2
      for (int i = 0; i < kStep / kTileColumns; ++i) {
        Tiles::Store(to + (column / kTileColumns + i) * kTileWeights, decoded[i]);
      }
    }
  }
}

// Up to two tiles of rows, which follow each other in memory.
template <typename C>
struct Rows {
  static constexpr int64_t kHalfBytes = kHalf * C::kBits / 8;
  static constexpr bool kFoldsScales = C::kScaling == Scaling::kGroupE8M0;

  const uint8_t* weights;
  const int64_t count, cols;
  const int64_t stride = cols * C::kBits / 8;  // bytes
  const uint8_t* scales[2 * kTileRows];        // of each row: finding them takes a division

  Rows(const Matrix& matrix, int64_t begin, int64_t end)
      : weights(RowOf<C>(matrix, begin).weights), count(end - begin), cols(matrix.cols) {
    for (int64_t r = 0; r < count; ++r) scales[r] = RowOf<C>(matrix, begin + r).scales;
  }

  // Rows [first, first + num) of them, half a block of columns: row by row to `to`. What is beyond the matrix
  // becomes zeros, and nothing is read there. What lies `ahead` bytes further on in each row is asked for.
  inline __attribute__((always_inline)) void Decode(int64_t first, int64_t num, int64_t block, int64_t half,
                                                    uint16_t* to, int64_t ahead) const {
    const int64_t column = block * kColumns + half * kHalf;
    if (cols - column < kHalf) return DecodeTail(first, num, column, to);
    const uint8_t* bytes = weights + first * stride + column * C::kBits / 8;
#pragma GCC unroll 4
    for (int64_t r = 0; r < num; ++r) {
      for (int64_t line = 0; line < kHalfBytes; line += 64) __builtin_prefetch(bytes + ahead + line);
      DecodeHalf<C>(bytes, kFoldsScales ? scales[first + r] + column / 32 : nullptr, to);
      bytes += stride;
      to += kTileColumns;
    }
  }

  // What the sums of a block of columns are scaled with, row by row; zeros beyond the matrix.
  inline __attribute__((always_inline)) void ReadScales(int64_t row, int64_t block, float* to) const {
    if constexpr (kScalesSums<C>) {
      const uint8_t* from = scales[row] + block * kSumsPerBlock<C> * BytesOfScale(C::kScaling);
      if constexpr (C::kScaling == Scaling::kBlock) {
        __builtin_memcpy(to, from, sizeof(float));
      } else {
        const int64_t present = Smaller(kSumsPerBlock<C>, (cols - block * kColumns) / C::kGroup);
#pragma GCC unroll 4
        for (int64_t i = 0; i < kSumsPerBlock<C>; ++i) {
          uint16_t bits = 0;
          if (i < present) __builtin_memcpy(&bits, from + 2 * i, sizeof bits);
          to[i] = FloatFromBf16(bits);
        }
      }
    }
  }

 private:
  void DecodeTail(int64_t first, int64_t num, int64_t column, uint16_t* to) const {
    const int64_t left = cols - column;
    for (int64_t r = first; r < first + num; ++r, to += kTileColumns) {
      uint8_t tail[kHalfBytes] = {}, tail_scales[2] = {};
      if (left > 0) {
        const uint8_t* bytes = weights + r * stride + column * C::kBits / 8;
        __builtin_memcpy(tail, bytes, static_cast<size_t>(left * C::kBits / 8));
        if constexpr (kFoldsScales) tail_scales[0] = scales[r][column / 32];
      }
      DecodeHalf<C>(tail, tail_scales, to);
    }
  }
};

// Sums [16 rows, 16 tokens] of one tile to their places, scaled where a scale belongs to the row.
template <typename C>
void WriteTile(const Matrix& matrix, int64_t row, int64_t num_rows, const float* sums, int64_t num_tokens,
               float* out, int64_t out_stride) {
  const auto present = static_cast<__mmask16>((1u << num_rows) - 1);
  alignas(64) float scales[kTileRows];
  for (int64_t r = 0; r < num_rows; ++r) scales[r] = RowScale<C>(matrix, row + r);
  const __m512 scale = _mm512_maskz_load_ps(present, scales);
  const __m512i places =
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(kTileTokens));
  for (int64_t t = 0; t < num_tokens; ++t) {
    const __m512 column = _mm512_i32gather_ps(places, sums + t, sizeof(float));
    _mm512_mask_storeu_ps(out + t * out_stride, present, _mm512_mul_ps(column, scale));
  }
}

// Up to 16 tokens: 16 rows at a time, all sums in registers. While the tiles work on one block of columns,
// the sums of the last are added and the next is decoded.
template <typename C>
struct FewTokens {
  static constexpr int64_t kAhead = 512;  // bytes of each row: sixteen rows are 8 KB

  // 4 KB: with twice as much, loads would be held up by stores to addresses that end in the same 12 bits.
  alignas(64) uint16_t weights[kTileRows * kColumns];
  alignas(64) float sums[2][kSumsPerBlock<C>][kTileFloats];
  float scales[2][kTileRows][kSumsPerBlock<C>];

  inline __attribute__((always_inline)) void Decode(const Rows<C>& rows, int64_t block, int64_t half) {
    rows.Decode(0, rows.count, block, half, weights + 2 * half * kTileWeights, kAhead);
  }

  inline __attribute__((always_inline)) void ReadScales(const Rows<C>& rows, int64_t block) {
    for (int64_t r = 0; r < rows.count; ++r) rows.ReadScales(r, block, scales[block & 1][r]);
  }

  inline __attribute__((always_inline)) void MultiplyStep(int64_t block, int step, const uint16_t* packed,
                                                          int64_t tokens) {
    if (kScalesSums<C> && step % kStepsPerSum<C> == 0) _tile_zero(0);
    FinishStores();
    _tile_loadd(4, weights + step * kTileWeights, kTileStride);
    _tile_loadd(6, packed + (block * kColumns + step * kTileColumns) * tokens, 4 * tokens);
    _tile_dpbf16ps(0, 4, 6);
    if (kScalesSums<C> && (step + 1) % kStepsPerSum<C> == 0) {
      _tile_stored(0, sums[block & 1][step / kStepsPerSum<C>], kTileStride);
    }
  }

  inline __attribute__((always_inline)) void AddSums(int64_t block, __m512* totals) const {
    if constexpr (kScalesSums<C>) {
#pragma GCC unroll 4
      for (int s = 0; s < kSumsPerBlock<C>; ++s) {
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
          totals[r] = _mm512_fmadd_ps(_mm512_load_ps(sums[block & 1][s] + r * kTileTokens),
                                      _mm512_set1_ps(scales[block & 1][r][s]), totals[r]);
        }
      }
    }
  }

  // Sums of 16 rows with all tokens, into sums[0][0].
  void Multiply(const Rows<C>& rows, const uint16_t* packed, int64_t tokens) {
    const int64_t blocks = RoundUpDiv(rows.cols, kColumns);
    // Tiles leave the places of absent tokens alone: zeros there are quick to add, chance is not.
    __builtin_memset(sums, 0, sizeof sums);
    __builtin_memset(scales, 0, sizeof scales);
    __m512 totals[kTileRows];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) totals[r] = _mm512_setzero_ps();
    _tile_zero(0);
    Decode(rows, 0, 0);
    Decode(rows, 0, 1);
    ReadScales(rows, 0);
    for (int64_t block = 0; block < blocks; ++block) {
      MultiplyStep(block, 0, packed, tokens);
      MultiplyStep(block, 1, packed, tokens);
      if (block > 0) AddSums(block - 1, totals);
      if (block + 1 < blocks) ReadScales(rows, block + 1);
      if (block + 1 < blocks) Decode(rows, block + 1, 0);
      MultiplyStep(block, 2, packed, tokens);
      MultiplyStep(block, 3, packed, tokens);
      if (block + 1 < blocks) Decode(rows, block + 1, 1);
    }
    if constexpr (kScalesSums<C>) {
      AddSums(blocks - 1, totals);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) _mm512_store_ps(sums[0][0] + r * kTileTokens, totals[r]);
    } else {
      _tile_stored(0, sums[0][0], kTileStride);
    }
  }
};

template <typename C>
void ProjectFew(const Matrix& matrix, int64_t row_begin, int64_t row_end, const PackedTokens& tokens,
                float* out, int64_t out_stride, uint8_t* workspace) {
  static_assert(sizeof(FewTokens<C>) <= kWorkspaceBytes);
  auto* work = reinterpret_cast<FewTokens<C>*>(workspace);
  const TileUse use(tokens.tokens);
  for (int64_t row = row_begin; row < row_end; row += kTileRows) {
    const int64_t end = row + kTileRows < row_end ? row + kTileRows : row_end;
    work->Multiply(Rows<C>(matrix, row, end), reinterpret_cast<const uint16_t*>(tokens.data), tokens.tokens);
    WriteTile<C>(matrix, row, end - row, work->sums[0][0], tokens.tokens, out + row - row_begin, out_stride);
  }
}

// More tokens. Two tiles of rows are decoded, and all tokens of the call pass over them, two tiles at a time.
// Of rows of 7168 columns the decoded rows are 448 KB and 64 tokens 896 KB: both stay in a second cache of 2
// MB. Longer rows come in chunks of 8192 columns.
template <typename C>
struct ManyTokens {
  static constexpr int64_t kRows = 2 * kTileRows, kMaxTiles = kMaxTokens / kTileTokens;
  static constexpr int64_t kChunk = 8192, kChunkBlocks = kChunk / kColumns,
                           kChunkSteps = kChunk / kTileColumns;
  static constexpr int64_t kAhead = 1024;  // bytes of a row

  // Sums of 2 x 2 tiles that wait to be scaled and added: the processor has the next products to do
  // meanwhile, and need not wait for the last of these.
  struct Taken {
    alignas(64) float sums[4][kTileFloats];
    float* totals[4];
    const float* scales;  // the first row's
  };

  alignas(64) uint16_t weights[2][kChunkSteps * kTileWeights];
  alignas(64) float totals[2][kMaxTiles][kTileFloats];
  alignas(64) float absent[kTileFloats];  // the total of a tile of tokens that is not there
  Taken taken[2];
  int turn;  // of the two, for the next sums
  float scales[kChunkBlocks][kSumsPerBlock<C>][kRows];

  // The rows' columns from `column` on, block by block: a row at a time would store to lines that are 1 KB
  // apart and share four sets of the first cache.
  void Decode(const Rows<C>& rows, int64_t column, int64_t blocks) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t block = column / kColumns + b;
      for (int64_t first = 0; first < rows.count; first += kTileRows) {
        const int64_t num = Smaller(kTileRows, rows.count - first);
        uint16_t* to = weights[first / kTileRows] + b * kSteps * kTileWeights;
        rows.Decode(first, num, block, 0, to, kAhead);
        rows.Decode(first, num, block, 1, to + 2 * kTileWeights, kAhead);
      }
      for (int64_t r = 0; r < rows.count; ++r) {
        float row_scales[kSumsPerBlock<C>] = {};
        rows.ReadScales(r, block, row_scales);
        for (int i = 0; i < kSumsPerBlock<C>; ++i) scales[b][i][r] = row_scales[i];
      }
    }
  }

  // Tiles 0 to 3 += both tiles of rows times two tiles of tokens, 32 columns of them.
  inline __attribute__((always_inline)) void MultiplyStep(int64_t step, const uint16_t* left,
                                                          const uint16_t* right) {
    FinishStores();
    _tile_loadd(4, weights[0] + step * kTileWeights, kTileStride);
    _tile_loadd(6, left + step * kTileColumns * kTileTokens, kTileStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + step * kTileColumns * kTileTokens, kTileStride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, weights[1] + step * kTileWeights, kTileStride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  static inline __attribute__((always_inline)) void Take(float* const* to) {
    _tile_stored(0, to[0], kTileStride);
    _tile_stored(1, to[1], kTileStride);
    _tile_stored(2, to[2], kTileStride);
    _tile_stored(3, to[3], kTileStride);
  }

  // All rows with two tiles of tokens.
  void MultiplyTokens(const uint16_t* left, const uint16_t* right, int64_t steps, float* const* to) {
    if constexpr (kScalesSums<C>) {
      for (int64_t sum = 0; sum < steps / kStepsPerSum<C>; ++sum) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
#pragma GCC unroll 4
        for (int s = 0; s < kStepsPerSum<C>; ++s) {
          MultiplyStep(sum * kStepsPerSum<C> + s, left, right);
          AddPart(taken[turn ^ 1], s);
        }
        Taken& now = taken[turn];
        float* const sums[] = {now.sums[0], now.sums[1], now.sums[2], now.sums[3]};
        Take(sums);
        for (int i = 0; i < 4; ++i) now.totals[i] = to[i];
        now.scales = &scales[0][0][0] + sum * kRows;
        turn ^= 1;
      }
    } else {
      FinishStores();
      _tile_loadd(0, to[0], kTileStride);
      _tile_loadd(1, to[1], kTileStride);
      _tile_loadd(2, to[2], kTileStride);
      _tile_loadd(3, to[3], kTileStride);
      for (int64_t s = 0; s < steps; ++s) MultiplyStep(s, left, right);
      Take(to);
    }
  }

  // Part `part` of kStepsPerSum: these additions lie between products.
  static inline __attribute__((always_inline)) void AddPart(const Taken& from, int part) {
    constexpr int kPart = 4 * kTileRows / kStepsPerSum<C>;
#pragma GCC unroll 64
    for (int i = part * kPart; i < (part + 1) * kPart; ++i) {
      const int tile = i / kTileRows, r = i % kTileRows;
      float* total = from.totals[tile] + r * kTileTokens;
      const __m512 scale = _mm512_set1_ps(from.scales[tile / 2 * kTileRows + r]);
      const __m512 sum = _mm512_load_ps(from.sums[tile] + r * kTileTokens);
      _mm512_store_ps(total, _mm512_fmadd_ps(sum, scale, _mm512_load_ps(total)));
    }
  }

  // Adds what still waits, and leaves nothing.
  void AddTaken() {
    Taken& last = taken[turn ^ 1];
    for (int part = 0; part < kStepsPerSum<C>; ++part) AddPart(last, part);
    Forget(last);
  }
  void Forget(Taken& what) {
    __builtin_memset(what.sums, 0, sizeof what.sums);
    for (float*& total : what.totals) total = absent;
    what.scales = &scales[0][0][0];
  }

  // Sums of up to 32 rows with all tokens, into `totals`.
  void Multiply(const Rows<C>& rows, const PackedTokens& tokens) {
    const int64_t tiles = RoundUpDiv(tokens.tokens, kTileTokens);
    __builtin_memset(totals, 0, sizeof totals);
    __builtin_memset(absent, 0, sizeof absent);
    __builtin_memset(scales[0], 0, sizeof scales[0]);
    turn = 0;
    Forget(taken[1]);
    for (int64_t column = 0; column < rows.cols; column += kChunk) {
      const int64_t blocks = Smaller(RoundUpDiv(rows.cols - column, kColumns), kChunkBlocks);
      Decode(rows, column, blocks);
      const auto* packed = reinterpret_cast<const uint16_t*>(tokens.data) + column * kTileTokens;
      for (int64_t j = 0; j < tiles; j += 2) {
        const bool two = j + 1 < tiles;
        const uint16_t* left = packed + j * kTileTokens * tokens.cols;
        float* const to[] = {totals[0][j], two ? totals[0][j + 1] : absent, totals[1][j],
                             two ? totals[1][j + 1] : absent};
        MultiplyTokens(left, two ? left + kTileTokens * tokens.cols : left, blocks * kSteps, to);
      }
      if constexpr (kScalesSums<C>) AddTaken();
    }
  }
};

template <typename C>
void ProjectMany(const Matrix& matrix, int64_t row_begin, int64_t row_end, const PackedTokens& tokens,
                 float* out, int64_t out_stride, uint8_t* workspace) {
  using Work = ManyTokens<C>;
  static_assert(sizeof(Work) <= kWorkspaceBytes);
  auto* work = reinterpret_cast<Work*>(workspace);
  const TileUse use;
  for (int64_t first = row_begin; first < row_end; first += Work::kRows) {
    const int64_t end = Smaller(first + Work::kRows, row_end);
    work->Multiply(Rows<C>(matrix, first, end), tokens);
    for (int64_t row = first; row < end; row += kTileRows) {
      for (int64_t token = 0; token < tokens.tokens; token += kTileTokens) {
        WriteTile<C>(matrix, row, Smaller(kTileRows, end - row),
                     work->totals[(row - first) / kTileRows][token / kTileTokens],
                     Smaller(kTileTokens, tokens.tokens - token), out + token * out_stride + row - row_begin,
                     out_stride);
      }
    }
  }
}

template <typename C>
void Project(const Matrix& matrix, int64_t row_begin, int64_t row_end, const PackedTokens& tokens, float* out,
             int64_t out_stride, uint8_t* workspace) {
  const auto project = tokens.tokens <= kTileTokens ? ProjectFew<C> : ProjectMany<C>;
  project(matrix, row_begin, row_end, tokens, out, out_stride, workspace);
}

// Which column of a chunk of 64 goes to each place.
template <typename C>
struct PackingOrder {
  alignas(64) uint16_t column[kHalf] = {};

  constexpr PackingOrder() {
    constexpr int kStep = C::template kStep<Tiles>;
    for (int c = 0; c < kHalf; ++c) {
      column[c / kStep * kStep + C::template Position<Tiles>(c % kStep)] = static_cast<uint16_t>(c);
    }
  }
};
template <typename C>
constexpr PackingOrder<C> kPackingOrder;

// The tokens of a tile lie side by side, two successive columns of each together: [columns / 2, width, 2].
// A chunk of 64 columns of one token, `count` of which are there; the others become zeros.
template <typename C>
inline void PackChunk(const uint16_t* from, int64_t count, uint16_t* to, int64_t width) {
  const uint64_t present = count >= kHalf ? ~uint64_t{0} : (uint64_t{1} << (count > 0 ? count : 0)) - 1;
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

// Behind a full tile the last one is filled up with zeros: a tile register's shape costs more to change.
template <typename C>
void Pack(const uint16_t* const* rows, int64_t begin, int64_t count, int64_t end, const PackedTokens& to) {
  constexpr int kStep = C::template kStep<Tiles>;
  const int64_t width = Smaller(to.tokens, kTileTokens);
  const int64_t first_chunk = Smaller(RoundUpDiv(begin, kHalf) * kHalf, end);
  const int64_t last_chunk = first_chunk + (end - first_chunk) / kHalf * kHalf;
  for (int64_t first = 0; first < to.tokens; first += width) {
    auto* tile = reinterpret_cast<uint16_t*>(to.data) + first * to.cols;
    for (int64_t t = 0; t < width; ++t) {
      const bool is_there = first + t < to.tokens;
      const uint16_t* row = rows[is_there ? first + t : first];
      const auto put = [&](int64_t c) {
        const int64_t position = c / kStep * kStep + C::template Position<Tiles>(static_cast<int>(c % kStep));
        const bool is_present = is_there && c < begin + count;
        tile[position / 2 * 2 * width + 2 * t + position % 2] = is_present ? row[c - begin] : uint16_t{0};
      };
      for (int64_t c = begin; c < first_chunk; ++c) put(c);
      for (int64_t c = first_chunk; c < last_chunk; c += kHalf) {
        PackChunk<C>(row + (c - begin), is_there ? begin + count - c : 0, tile + c * width + 2 * t, width);
      }
      for (int64_t c = last_chunk; c < end; ++c) put(c);
    }
  }
}

template <typename C>
void DecodeAll(const uint8_t* bytes, int64_t count, float* out) {
  constexpr int kStep = C::template kStep<Tiles>;
  for (int64_t step = 0; step < count; step += kStep) {
    __m512i decoded[kStep / kTileColumns];
    uint16_t stored[kStep];
    C::template Decode<Tiles>(bytes + step * C::kBits / 8, decoded);
    for (int i = 0; i < kStep / kTileColumns; ++i) Tiles::Store(stored + i * kTileColumns, decoded[i]);
    for (int c = 0; c < kStep; ++c) out[step + c] = FloatFromBf16(stored[C::template Position<Tiles>(c)]);
  }
}

template <typename C>
struct TileKernels {
  static constexpr CodecKernels Make() {
    static_assert(kHalf % C::template kStep<Tiles> == 0,
                  "a chunk of 64 columns is packed and decoded by itself");
    return {sizeof(uint16_t), kTileTokens, Pack<C>, Project<C>, DecodeAll<C>};
  }
};

uint64_t Read(const uint8_t* memory, int64_t bytes) { return kAvx512Kernels.read(memory, bytes); }

}  // namespace

constinit const IsaKernels kAmxKernels = MakeIsaKernels<TileKernels>(Read, MultiplyAddsOfTiles);

}  // namespace hmoe
