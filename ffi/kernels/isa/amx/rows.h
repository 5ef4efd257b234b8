// Rows of weights as tiles want them: decoded to bfloat16, a slice of columns at a time, and the scales of
// their blocks or groups.
#pragma once

#include "kernels/codecs.h"
#include "kernels/isa/amx/tiles.h"
#include "kernels/isa/avx512_bf16.h"

namespace hmoe {
namespace {

constexpr int64_t kStripRows = 2 * kTileRows;  // rows that are decoded together
constexpr int64_t kColumns = 128;              // of a block
constexpr int kSteps = kColumns / kTileColumns;
constexpr int64_t kWindow = 16;  // scales of a row that are read at once

constexpr int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t Larger(int64_t a, int64_t b) { return a < b ? b : a; }

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

// Where sums of a part of a row are scaled, each by a scale of its own; and where the scale goes into the
// decoded weights. Elsewhere it belongs to a whole row, or there is none.
template <typename C>
constexpr bool kScalesSums = C::kScaling == Scaling::kBlock || C::kScaling == Scaling::kGroupBf16;
template <typename C>
constexpr bool kScalesWeights = C::kScaling == Scaling::kGroupE8M0;

template <typename C>
constexpr int kScalesPerBlock = kScalesSums<C> || kScalesWeights<C> ? kColumns / ColumnsPerScale<C>() : 0;
template <typename C>
constexpr int64_t kBlocksPerWindow = kScalesPerBlock<C> > 0 ? kWindow / kScalesPerBlock<C> : 1;

// Columns that are decoded at once: of a block, and in steps of a tile.
template <typename C>
constexpr int kSlice = C::template kStep<Tiles>;
template <typename C>
constexpr int kStepsPerSlice = kSlice<C> / kTileColumns;
template <typename C>
constexpr int kSlices = kColumns / kSlice<C>;

// Whether weights are stored as tiles want them, so that whole tiles are read where they are.
template <typename C>
constexpr bool kAsStored = C::kScaling == Scaling::kNone;

// What a window of scales becomes: floats to multiply sums with; of MXFP4, what is to be added to each of two
// bfloat16 for a power of two.
template <typename C>
struct ScaleWindow {
  alignas(64) uint32_t scale[kStripRows][kWindow];
  uint16_t
      special[kStripRows / 4];  // of four rows: a bit for each with which weights leave the normal numbers

  // The first of a block's; kWindow behind it begin those of the next row.
  const uint32_t* OfBlock(int64_t block) const {
    return scale[0] + block % kBlocksPerWindow<C> * kScalesPerBlock<C>;
  }
};

// Scales of whole rows: ones where there are none such.
template <typename C>
class RowScales {
 public:
  RowScales(const Matrix& matrix, int64_t begin, int64_t end) {
    ScalePlace place(matrix, begin);
    for (int64_t r = 0; r < end - begin; ++r, ++place) scales_[r] = RowScale<C>(matrix, *place);
  }
  __m512 Of(int64_t first) const { return _mm512_load_ps(scales_ + first); }

 private:
  alignas(64) float scales_[kStripRows] = {};
};

// A tile of weights in memory: where it begins, and the bytes between its rows.
struct WeightTile {
  const void* first;
  int64_t stride;
};

// Up to two tiles of rows, which follow each other in memory.
template <typename C>
class Rows {
 public:
  // Of them columns are read up to `last_column`, and then what lies at `next` and, for each next row, as
  // many bytes behind it as rows are long.
  Rows(const Matrix& matrix, int64_t begin, int64_t end, int64_t last_column, const uint8_t* next)
      : weights_(RowOf<C>(matrix, begin).weights),
        count_(end - begin),
        cols_(matrix.cols),
        end_(last_column * C::kBits / 8) {
    if (next != nullptr) from_end_to_next_ = next - (weights_ + end_);
    if constexpr (kScalesPerBlock<C> > 0) {
      ScalePlace place(matrix, begin);
      for (int64_t r = 0; r < count_; ++r, ++place) {
        scales_[r] = matrix.scales + *place * ScaleBytesPerRow<C>(cols_);
      }
    }
  }

  int64_t blocks() const { return (cols_ + kColumns - 1) / kColumns; }

  // Asks for what a tile of rows needs after a slice of columns, and decodes the slice, unless tiles are read
  // where they are stored and nobody wants copies: to the weight tile at `to` and, of a slice of two, the one
  // behind it. What is beyond the matrix becomes zeros, and nothing is read there.
  template <bool kToFirstCache, bool kCopies = false>
  inline __attribute__((always_inline)) void Decode(int tile, int64_t block, int slice,
                                                    const ScaleWindow<C>& window, uint16_t* to) const {
    const int64_t first = tile * kTileRows, column = block * kColumns + slice * kSlice<C>;
    if (__builtin_expect(!IsWhole(first, column), 0)) {
      DecodePresent(first, Smaller(kTileRows, count_ - first), column, to);
      return;
    }
    const int64_t place = column * C::kBits / 8;
    const uint8_t* bytes = weights_ + first * stride_ + place;
    const uint8_t* ahead = bytes + kAhead + (place + kAhead < end_ ? 0 : from_end_to_next_);
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; r += 4, bytes += 4 * stride_, ahead += 4 * stride_) {
      if (slice * kSliceBytes % 64 == 0) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          for (int64_t line = 0; line < kSliceBytes; line += 64)
            __builtin_prefetch(ahead + i * stride_ + line, 0, kToFirstCache ? 3 : 2);
        }
      }
      if constexpr (kAsStored<C> && !kCopies) continue;
      if constexpr (kScalesWeights<C>) {
        DecodeFourGroups(bytes, window, first + r, column / C::kGroup, to + r * kTileColumns);
      } else {
        DecodeFour(bytes, to + r * kTileColumns);
      }
    }
  }

  // Where step `step` of a block finds its tile of rows: `decoded`, or the matrix.
  inline __attribute__((always_inline)) WeightTile Find(int tile, int64_t block, int step,
                                                        const uint16_t* decoded) const {
    if constexpr (kAsStored<C>) {
      const int64_t first = tile * kTileRows, column = block * kColumns + step * kTileColumns;
      if (__builtin_expect(IsWhole(first, column / kSlice<C> * kSlice<C>), 1)) {
        return {weights_ + first * stride_ + column * C::kBits / 8, stride_};
      }
    }
    return {decoded, kTileStride};
  }

  // Scales [index * kWindow, (index + 1) * kWindow) of each row; zeros beyond the matrix.
  void ReadScales(int64_t index, ScaleWindow<C>* to) const {
    constexpr int kBytes = BytesOfScale(C::kScaling);
    const int64_t left = ScaleBytesPerRow<C>(cols_) / kBytes - index * kWindow;
    const auto present = static_cast<__mmask16>(left >= kWindow ? 0xffff : (1 << left) - 1);
    for (int64_t r = 0; r < count_; ++r) {
      const uint8_t* from = scales_[r] + index * kWindow * kBytes;
      __m512i scale;
      if constexpr (C::kScaling == Scaling::kBlock) {
        scale = _mm512_maskz_loadu_epi32(present, from);
      } else if constexpr (C::kScaling == Scaling::kGroupBf16) {
        scale = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, from)), 16);
      } else {
        const __m512i exponents = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(present, from));
        if (r % 4 == 0) to->special[r / 4] = 0;
        to->special[r / 4] |= _mm512_mask_cmpgt_epu32_mask(
            present, _mm512_sub_epi32(exponents, _mm512_set1_epi32(2)), _mm512_set1_epi32(250));
        const __m512i power = _mm512_slli_epi32(_mm512_sub_epi32(exponents, _mm512_set1_epi32(127)), 7);
        scale = _mm512_mask_blend_epi16(0xaaaaaaaa, power, _mm512_slli_epi32(power, 16));
      }
      _mm512_store_si512(to->scale[r], scale);
    }
  }

 private:
  static constexpr int64_t kSliceBytes = kSlice<C> * C::kBits / 8;
  // Bytes of each row; to the first cache where sixteen rows are read. With twice as many, whose lines mostly
  // fall into the same few sets, they would not stay there until they are needed.
  static constexpr int64_t kAhead = 512;

  bool IsWhole(int64_t first, int64_t column) const {
    return cols_ - column >= kSlice<C> && count_ >= first + kTileRows;
  }

  // A slice of a row becomes a row of a weight tile at `to`, or of two that follow each other.
  static inline __attribute__((always_inline)) void DecodeOne(const uint8_t* bytes, uint16_t* to) {
    __m512i decoded[kStepsPerSlice<C>];
    C::template Decode<Tiles>(bytes, decoded);
#pragma GCC unroll 2
    for (int i = 0; i < kStepsPerSlice<C>; ++i) Tiles::Store(to + i * kTileWeights, decoded[i]);
  }

  // Four rows. Of E4M3 they are looked at together: a comparison is as much work as decoding half a row.
  inline __attribute__((always_inline)) void DecodeFour(const uint8_t* bytes, uint16_t* to) const {
    if constexpr (requires { C::kMostUsual; }) {
      __m512i encoded[4], most = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        encoded[i] = Tiles::LoadBytes(bytes + i * stride_);
        most = Tiles::MaxBytes(most, C::template Unusual<Tiles>(encoded[i]));
      }
      if (__builtin_expect(Tiles::AllAtMost(most, C::kMostUsual), 1)) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          __m512i decoded[2];
          C::template DecodeOrdinary<Tiles>(encoded[i], decoded);
          Tiles::Store(to + i * kTileColumns, decoded[0]);
          Tiles::Store(to + i * kTileColumns + kTileWeights, decoded[1]);
        }
        return;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) DecodeOne(bytes + i * stride_, to + i * kTileColumns);
  }

  // A group of MXFP4 in each of four rows, with its power of two: that goes into the exponents of the table's
  // entries. Only what would leave the normal numbers is computed one by one: E2M1 itself uses the exponents
  // 126 to 129.
  inline __attribute__((always_inline)) void DecodeFourGroups(const uint8_t* bytes,
                                                              const ScaleWindow<C>& window, int64_t row,
                                                              int64_t group, uint16_t* to) const {
    constexpr __mmask32 kNotZero = 0xfefefefe;
    const __m512i table = Tiles::Table(C::kTable);
    if (__builtin_expect(window.special[row / 4] >> group % kWindow & 1, 0)) {
      for (int i = 0; i < 4; ++i) {
        DecodeGroupExactly(bytes + i * stride_, scales_[row + i][group], to + i * kTileColumns);
      }
      return;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i power = _mm512_set1_epi32(static_cast<int>(window.scale[row + i][group % kWindow]));
      Tiles::Store(
          to + i * kTileColumns,
          Tiles::LookUpGroup(_mm512_mask_add_epi16(table, kNotZero, table, power), bytes + i * stride_));
    }
  }

  static __attribute__((noinline)) void DecodeGroupExactly(const uint8_t* bytes, unsigned exponent,
                                                           uint16_t* to) {
    for (int column = 0; column < kTileColumns; ++column) {
      const float value = C::kTable.value[bytes[column / 2] >> (column % 2 * 4) & 15];
      to[Tiles::NibblePosition(column)] = Bf16FromFloat(value * FloatFromE8M0(exponent));
    }
  }

  // Where rows or columns are missing.
  __attribute__((noinline)) void DecodePresent(int64_t first, int64_t count, int64_t column,
                                               uint16_t* to) const {
    const int64_t present = Smaller(kSlice<C>, cols_ - column);
    for (int64_t r = first; r < first + count; ++r, to += kTileColumns) {
      uint8_t bytes[kSliceBytes] = {};
      if (present > 0) {
        __builtin_memcpy(bytes, weights_ + r * stride_ + column * C::kBits / 8,
                         static_cast<size_t>(present * C::kBits / 8));
      }
      if constexpr (kScalesWeights<C>) {
        DecodeGroupExactly(bytes, present > 0 ? scales_[r][column / C::kGroup] : 0, to);
      } else {
        DecodeOne(bytes, to);
      }
    }
  }

  const uint8_t* const weights_;
  const int64_t count_, cols_;
  const int64_t stride_ = cols_ * C::kBits / 8;  // bytes
  const int64_t end_;                            // of what is read of a row, in bytes
  // From there to what is read next in its place: in bytes, or nowhere.
  int64_t from_end_to_next_ = -kAhead;
  const uint8_t* scales_[kStripRows];
};

// The window of scales that is in use, and the next.
template <typename C>
class ScaleWindows {
 public:
  // What the first block that is used needs.
  void Begin(const Rows<C>& rows, int64_t block) {
    const int64_t window = block / kBlocksPerWindow<C>;
    if constexpr (kScalesPerBlock<C> > 0) rows.ReadScales(window, &windows_[window % 2]);
  }
  // What each one after it needs, in their order.
  void Advance(const Rows<C>& rows, int64_t block) {
    if (block % kBlocksPerWindow<C> == 0) Begin(rows, block);
  }
  const ScaleWindow<C>& Of(int64_t block) const { return windows_[block / kBlocksPerWindow<C> % 2]; }

 private:
  ScaleWindow<C> windows_[2];
};

}  // namespace
}  // namespace hmoe
