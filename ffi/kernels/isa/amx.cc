// AMX-BF16: products of tiles, 16 rows of weights x 32 columns with up to 16 tokens.
//
// A tile product takes as long for one token as for sixteen, and a weight is decoded once for all of them, so
// tiles serve every number of tokens: that keeps a token's bits the same in every batch.
//
// Order of additions: the processor adds the even and the odd columns of 32 apart, then both to the tile (all
// rounded to nearest, subnormals as zero). Where a scale belongs to a whole row, or is folded into the
// decoded weights, the tile keeps the sum for the whole row. Elsewhere the sum is taken out after each block
// or group, scaled, and added to the row's total in FP32.

#include "kernels/isa/amx/pack.h"
#include "kernels/isa/amx/rows.h"
#include "kernels/isa/dot_peak.h"

namespace hmoe {
namespace {

// Products of one sum with a scale of its own; otherwise of a block.
template <typename C>
constexpr int kStepsPerSum = kScalesSums<C> ? kSteps / kScalesPerBlock<C> : kSteps;

// Up to 16 rows with 16 tokens, or 32 with 32: one or two tiles of each. While the tiles work on a block of
// columns, the slices of it that they are done with make room for those of the next, and the sums of the last
// are added: the vector ports would be idle otherwise.
template <typename C>
class Strip {
 public:
  // Sums of all rows with the tokens at `left` and, of kTokenTiles 2, `right`; tiles are `width` tokens wide.
  template <int kRowTiles, int kTokenTiles>
  void Multiply(const Rows<C>& rows, const uint16_t* left, const uint16_t* right, int64_t width);

  // Those with token `token` of tile `tile` to out[0 .. num_rows), scaled where a scale belongs to the row.
  void Write(const float* scales, int64_t num_rows, int64_t tile, int64_t token, float* out) const;

  // Tiles leave the places of absent tokens alone: zeros there are quick to add, chance is not.
  void Clear() { __builtin_memset(sums_, 0, sizeof sums_); }

 private:
  template <int kRowTiles, int kTokenTiles>
  void MultiplyStep(const Rows<C>& rows, int64_t block, int step, const uint16_t* left, const uint16_t* right,
                    int64_t stride) const;
  template <int kRowTiles, int kTokenTiles>
  void AddPart(int part, const float (*sums)[kTileFloats], const uint32_t* scales);

  // Of a slice, only the same slice of the other rows lies a multiple of 4 KB away: loads of other slices
  // would be held up by stores to such addresses.
  alignas(64) uint16_t weights_[2][kSteps * kTileWeights];
  alignas(64) float totals_[4][kTileFloats];   // rows' tile * 2 + tokens' tile
  alignas(64) float sums_[2][4][kTileFloats];  // the last to be taken out, and the one before
  ScaleWindow<C> windows_[2];
};

template <int kRowTiles, int kTokenTiles>
inline __attribute__((always_inline)) void ZeroTiles() {
  _tile_zero(0);
  if constexpr (kTokenTiles == 2) _tile_zero(1);
  if constexpr (kRowTiles == 2) _tile_zero(2);
  if constexpr (kRowTiles * kTokenTiles == 4) _tile_zero(3);
}

template <int kRowTiles, int kTokenTiles>
inline __attribute__((always_inline)) void StoreTiles(float (*to)[kTileFloats]) {
  _tile_stored(0, to[0], kTileStride);
  if constexpr (kTokenTiles == 2) _tile_stored(1, to[1], kTileStride);
  if constexpr (kRowTiles == 2) _tile_stored(2, to[2], kTileStride);
  if constexpr (kRowTiles * kTokenTiles == 4) _tile_stored(3, to[3], kTileStride);
}

template <typename C>
template <int kRowTiles, int kTokenTiles>
inline __attribute__((always_inline)) void Strip<C>::MultiplyStep(const Rows<C>& rows, int64_t block,
                                                                  int step, const uint16_t* left,
                                                                  const uint16_t* right,
                                                                  int64_t stride) const {
  FinishStores();
  const auto upper = rows.Find(0, block, step, weights_[0] + step * kTileWeights);
  _tile_loadd(4, upper.first, upper.stride);
  _tile_loadd(6, left, stride);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kTokenTiles == 2) {
    _tile_loadd(7, right, stride);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (kRowTiles == 2) {
    const auto lower = rows.Find(1, block, step, weights_[1] + step * kTileWeights);
    _tile_loadd(5, lower.first, lower.stride);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kTokenTiles == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

// One of kStepsPerSum parts of the additions, which lie between products.
template <typename C>
template <int kRowTiles, int kTokenTiles>
inline __attribute__((always_inline)) void Strip<C>::AddPart(int part, const float (*sums)[kTileFloats],
                                                             const uint32_t* scales) {
  constexpr int64_t kPart = kRowTiles * kTileRows / kStepsPerSum<C>;
#pragma GCC unroll 32
  for (int64_t r = part * kPart; r < (part + 1) * kPart; ++r) {
    const __m512 scale = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(scales[r * kWindow])));
#pragma GCC unroll 2
    for (int t = 0; t < kTokenTiles; ++t) {
      const int64_t tile = r / kTileRows * 2 + t, place = r % kTileRows * kTileTokens;
      float* total = totals_[tile] + place;
      _mm512_store_ps(total,
                      _mm512_fmadd_ps(_mm512_load_ps(sums[tile] + place), scale, _mm512_load_ps(total)));
    }
  }
}

template <typename C>
template <int kRowTiles, int kTokenTiles>
void Strip<C>::Multiply(const Rows<C>& rows, const uint16_t* left, const uint16_t* right, int64_t width) {
  constexpr int64_t kBlocksPerWindow = kScalesPerBlock<C> > 0 ? kWindow / kScalesPerBlock<C> : 1;
  const int64_t blocks = rows.blocks(), step_size = kTileColumns * width, stride = 4 * width;
  const auto decode = [&](int64_t block, int slice) __attribute__((always_inline)) {
    rows.template Decode<kRowTiles>(block, slice, windows_[block / kBlocksPerWindow % 2],
                                    weights_[0] + slice * kStepsPerSlice<C> * kTileWeights);
  };
  const auto read_scales = [&](int64_t block) __attribute__((always_inline)) {
    if constexpr (kScalesPerBlock<C> > 0) {
      const int64_t window = block / kBlocksPerWindow;
      if (block % kBlocksPerWindow == 0) rows.ReadScales(window, &windows_[window % 2]);
    }
  };

  __builtin_memset(totals_, 0, sizeof totals_);
  read_scales(0);
#pragma GCC unroll 4
  for (int slice = 0; slice < kColumns / kSlice<C>; ++slice) decode(0, slice);
  ZeroTiles<kRowTiles, kTokenTiles>();
  const uint32_t* waiting = nullptr;  // scales of the sums that were taken out last
  for (int64_t block = 0; block < blocks; ++block) {
    const bool is_last = block + 1 == blocks;
    if (!is_last) read_scales(block + 1);
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; ++step) {
      const int sum = step / kStepsPerSum<C>, part = step % kStepsPerSum<C>;
      if (kScalesSums<C> && part == 0) ZeroTiles<kRowTiles, kTokenTiles>();
      MultiplyStep<kRowTiles, kTokenTiles>(rows, block, step, left, right, stride);
      left += step_size;
      right += step_size;
      if constexpr (kScalesSums<C>) {
        const int turn = kScalesPerBlock<C> == 1 ? static_cast<int>(block % 2) : sum % 2;
        if (waiting != nullptr) AddPart<kRowTiles, kTokenTiles>(part, sums_[turn ^ 1], waiting);
        if (part + 1 == kStepsPerSum<C>) {
          StoreTiles<kRowTiles, kTokenTiles>(sums_[turn]);
          waiting = &windows_[block / kBlocksPerWindow % 2]
                         .scale[0][block % kBlocksPerWindow * kScalesPerBlock<C> + sum];
        }
      }
      if ((step + 1) % kStepsPerSlice<C> == 0 && !is_last) decode(block + 1, step / kStepsPerSlice<C>);
    }
  }
  if constexpr (kScalesSums<C>) {
    const int turn = kScalesPerBlock<C> == 1 ? static_cast<int>((blocks - 1) % 2) : 1;
    for (int part = 0; part < kStepsPerSum<C>; ++part)
      AddPart<kRowTiles, kTokenTiles>(part, sums_[turn], waiting);
  } else {
    StoreTiles<kRowTiles, kTokenTiles>(totals_);
  }
}

template <typename C>
void Strip<C>::Write(const float* scales, int64_t num_rows, int64_t tile, int64_t token, float* out) const {
  const __m512i places =
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(kTileTokens));
  for (int64_t row = 0; row < num_rows; row += kTileRows) {
    const auto present = static_cast<__mmask16>((1u << Smaller(kTileRows, num_rows - row)) - 1);
    const float* sums = totals_[row / kTileRows * 2 + tile] + token;
    const __m512 scaled =
        _mm512_mul_ps(_mm512_i32gather_ps(places, sums, sizeof(float)), _mm512_load_ps(scales + row));
    _mm512_mask_storeu_ps(out + row, present, scaled);
  }
}

template <typename C, int kRowTiles>
void ProjectStrips(const Matrix& matrix, int64_t row_begin, int64_t row_end, const PackedTokens& tokens,
                   float* out, int64_t out_stride, const uint8_t* next, Strip<C>* strip) {
  const int64_t width = Smaller(tokens.tokens, kTileTokens);
  const TileUse use(width);
  strip->Clear();
  for (int64_t row = row_begin; row < row_end; row += kRowTiles * kTileRows) {
    const int64_t num_rows = Smaller(kRowTiles * kTileRows, row_end - row);
    const Rows<C> rows(matrix, row, row + num_rows,
                       row + num_rows < row_end ? RowOf<C>(matrix, row + num_rows).weights : next);
    alignas(64) float scales[kStripRows] = {};
    ScalePlace place(matrix, row);
    for (int64_t r = 0; r < num_rows; ++r, ++place) scales[r] = RowScale<C>(matrix, *place);
    for (int64_t first = 0; first < tokens.tokens; first += 2 * kTileTokens) {
      const auto* left = reinterpret_cast<const uint16_t*>(tokens.data) + first * tokens.cols;
      if (kRowTiles == 2 && tokens.tokens - first > kTileTokens) {
        strip->template Multiply<kRowTiles, 2>(rows, left, left + kTileTokens * tokens.cols, width);
      } else {
        strip->template Multiply<kRowTiles, 1>(rows, left, left, width);
      }
      const int64_t count = Smaller(2 * kTileTokens, tokens.tokens - first);
      for (int64_t t = 0; t < count; ++t) {
        strip->Write(scales, num_rows, t / kTileTokens, t % kTileTokens,
                     out + (first + t) * out_stride + row - row_begin);
      }
    }
  }
}

template <typename C>
void Project(const Matrix& matrix, int64_t row_begin, int64_t row_end, const PackedTokens& tokens, float* out,
             int64_t out_stride, const uint8_t* next, uint8_t* workspace) {
  static_assert(sizeof(Strip<C>) <= kWorkspaceBytes);
  const auto project = tokens.tokens <= kTileTokens ? ProjectStrips<C, 1> : ProjectStrips<C, 2>;
  project(matrix, row_begin, row_end, tokens, out, out_stride, next, reinterpret_cast<Strip<C>*>(workspace));
}

template <typename C>
struct TileKernels {
  static constexpr CodecKernels Make() {
    static_assert(kChunk % C::template kStep<Tiles> == 0, "a chunk of columns is packed by itself");
    return {sizeof(uint16_t), kTileTokens, Pack<C>, Project<C>, DecodeAll<Tiles, C>};
  }
};

uint64_t Read(const uint8_t* memory, int64_t bytes) { return kAvx512Kernels.read(memory, bytes); }

}  // namespace

constinit const IsaKernels kAmxKernels = MakeIsaKernels<TileKernels>(Read, MultiplyAddsOfTiles);

}  // namespace hmoe
