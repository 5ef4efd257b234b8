// Sums of tiles: of up to two tiles of rows with up to two of tokens.
//
// Order of additions: the processor adds the even and the odd columns of 32 apart, then both to the tile (all
// rounded to nearest, subnormals as zero). Where a scale belongs to a whole row, or is folded into the
// decoded weights, the tile keeps the sum for the whole row. Elsewhere the sum is taken out after each block
// or group, scaled, and added to the row's total in FP32.
#pragma once

#include "kernels/isa/amx/rows.h"

namespace hmoe {
namespace {

// By place: upper rows with the left and with the right tokens, lower rows with both.
using TileSums = float[4][kTileFloats];

// Packed activations of one or two tiles of tokens, `width` tokens wide.
struct TokenTiles {
  const uint16_t *left, *right;
  int64_t width;

  // Those of tokens `first`, a multiple of a tile, and on.
  static TokenTiles From(const PackedTokens& tokens, int64_t first) {
    const auto* left = reinterpret_cast<const uint16_t*>(tokens.data) + first * tokens.cols;
    const bool is_pair = tokens.tokens - first > kTileTokens;
    return {left, is_pair ? left + kTileTokens * tokens.cols : left, Smaller(tokens.tokens, kTileTokens)};
  }
  TokenTiles After(int64_t columns) const { return {left + columns * width, right + columns * width, width}; }
};

// Register i holds the sums of place i.
template <int kRowTiles, int kTokenTiles>
inline __attribute__((always_inline)) void ZeroTiles() {
  _tile_zero(0);
  if constexpr (kTokenTiles == 2) _tile_zero(1);
  if constexpr (kRowTiles == 2) _tile_zero(2);
  if constexpr (kRowTiles * kTokenTiles == 4) _tile_zero(3);
}

template <int kRowTiles, int kTokenTiles>
inline __attribute__((always_inline)) void LoadTiles(const TileSums& from) {
  FinishStores();
  _tile_loadd(0, from[0], kTileStride);
  if constexpr (kTokenTiles == 2) _tile_loadd(1, from[1], kTileStride);
  if constexpr (kRowTiles == 2) _tile_loadd(2, from[2], kTileStride);
  if constexpr (kRowTiles * kTokenTiles == 4) _tile_loadd(3, from[3], kTileStride);
}

template <int kRowTiles, int kTokenTiles>
inline __attribute__((always_inline)) void StoreTiles(TileSums& to) {
  _tile_stored(0, to[0], kTileStride);
  if constexpr (kTokenTiles == 2) _tile_stored(1, to[1], kTileStride);
  if constexpr (kRowTiles == 2) _tile_stored(2, to[2], kTileStride);
  if constexpr (kRowTiles * kTokenTiles == 4) _tile_stored(3, to[3], kTileStride);
}

// The products of successive blocks of columns. What is taken out of the tiles is added to its totals while
// they work on what comes after.
template <typename C>
class Products {
 public:
  // Tiles leave the places of absent tokens alone: zeros there are quick to add, chance is not.
  void Clear() { __builtin_memset(this, 0, sizeof *this); }

  // Products of one block: `weights(tile, step)` says where the weights of a step lie, and `between(step)` is
  // called behind it. Sums with scales of their own are scaled and added to `totals`, the last of them in the
  // next call or in Finish (where calls differ in their tiles of tokens, kWaitingTokenTiles is the most);
  // `scales` has those of a row, and kWindow behind them those of the next. Other sums stay in the tiles.
  template <int kRowTiles, int kTokenTiles, int kWaitingTokenTiles = kTokenTiles, typename Weights,
            typename Between>
  inline __attribute__((always_inline)) void MultiplyBlock(const Weights& weights, TokenTiles tokens,
                                                           const uint32_t* scales, TileSums& totals,
                                                           const Between& between) {
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; ++step) {
      const int sum = step / kStepsPerSum, part = step % kStepsPerSum;
      if (kScalesSums<C> && part == 0) ZeroTiles<kRowTiles, kTokenTiles>();
      MultiplyStep<kRowTiles, kTokenTiles>(weights, step, tokens.After(step * kTileColumns));
      if constexpr (kScalesSums<C>) {
        const int turn = Turn(sum);
        if (waiting_.scales != nullptr) AddPart<kRowTiles, kWaitingTokenTiles>(part, sums_[turn ^ 1]);
        if (part + 1 == kStepsPerSum) {
          waiting_ = {scales + sum, &totals};
          StoreTiles<kRowTiles, kTokenTiles>(sums_[turn]);
          turn_ ^= kSumsPerBlock % 2;
        }
      }
      between(step);
    }
  }

  template <int kRowTiles, int kTokenTiles>
  void Finish() {
    if (waiting_.scales == nullptr) return;
    for (int part = 0; part < kStepsPerSum; ++part)
      AddPart<kRowTiles, kTokenTiles>(part, sums_[Turn(kSumsPerBlock) ^ 1]);
    waiting_.scales = nullptr;
  }

 private:
  // Products of one sum with a scale of its own; otherwise of a block.
  static constexpr int kSumsPerBlock = kScalesSums<C> ? kScalesPerBlock<C> : 1;
  static constexpr int kStepsPerSum = kSteps / kSumsPerBlock;

  // In which of the two places a block's sum is put: in turn, which the compiler knows where a block has an
  // even number of them.
  int Turn(int sum) const { return kSumsPerBlock % 2 == 0 ? sum % 2 : turn_; }

  // Activations of many tokens come from the second cache, where they are wanted once per strip of rows: not
  // to be kept in the first, they leave it to sums and decoded weights.
  template <int kRowTiles, int kTokenTiles, typename Weights>
  static inline __attribute__((always_inline)) void MultiplyStep(const Weights& weights, int step,
                                                                 const TokenTiles& tokens) {
    const int64_t stride = 4 * tokens.width;
    FinishStores();
    const WeightTile upper = weights(0, step);
    _tile_loadd(4, upper.first, upper.stride);
    if constexpr (kRowTiles == 2) {
      _tile_stream_loadd(6, tokens.left, stride);
    } else {
      _tile_loadd(6, tokens.left, stride);
    }
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTokenTiles == 2) {
      _tile_stream_loadd(7, tokens.right, stride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRowTiles == 2) {
      const WeightTile lower = weights(1, step);
      _tile_loadd(5, lower.first, lower.stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTokenTiles == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }

  // One of kStepsPerSum parts of the additions.
  template <int kRowTiles, int kTokenTiles>
  inline __attribute__((always_inline)) void AddPart(int part, const TileSums& sums) {
    constexpr int64_t kPart = kRowTiles * kTileRows / kStepsPerSum;
#pragma GCC unroll 32
    for (int64_t r = part * kPart; r < (part + 1) * kPart; ++r) {
      const auto scale = static_cast<int>(waiting_.scales[r * kWindow]);
#pragma GCC unroll 2
      for (int t = 0; t < kTokenTiles; ++t) {
        const int64_t tile = r / kTileRows * 2 + t, place = r % kTileRows * kTileTokens;
        float* total = (*waiting_.totals)[tile] + place;
        const __m512 sum = _mm512_load_ps(sums[tile] + place);
        const __m512 factor = _mm512_castsi512_ps(_mm512_set1_epi32(scale));
        _mm512_store_ps(total, _mm512_fmadd_ps(sum, factor, _mm512_load_ps(total)));
      }
    }
  }

  alignas(64) TileSums sums_[2];  // the last to be taken out, and the one before
  struct {
    const uint32_t* scales;
    TileSums* totals;
  } waiting_;  // of the last to be taken out
  int turn_;
};

}  // namespace
}  // namespace hmoe
