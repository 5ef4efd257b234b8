// The tile registers of AMX, held for a call, and what lies in them.
//
// Compilers know neither that loading tiles or their shapes reads memory: a store before it may come after,
// or never (seen with GCC 12). FinishStores stands between.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace hmoe {
namespace {

constexpr int64_t kTileRows = 16, kTileTokens = 16, kTileColumns = 32;
constexpr int64_t kTileFloats = kTileRows * kTileTokens, kTileWeights = kTileRows * kTileColumns;
constexpr int64_t kTileStride = 64;  // bytes between the rows of a full tile

inline __attribute__((always_inline)) void FinishStores() { __asm__ volatile("" ::: "memory"); }

// Sixteen rows in all eight tiles. By use: 0 to 3 are sums and 6 and 7 activations, a column of four bytes
// for each token; 4 and 5 are weights, 32 of them in a row.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit TileShapes(int64_t tokens) {
    for (int i = 0; i < 8; ++i) {
      rows[i] = kTileRows;
      row_bytes[i] = i == 4 || i == 5 ? kTileStride : static_cast<uint16_t>(4 * tokens);
    }
  }
};

// Left in use, tiles would cost 8 KB at every switch of threads.
class TileUse {
 public:
  explicit TileUse(int64_t tokens = kTileTokens) {
    const TileShapes shapes(tokens);
    FinishStores();
    _tile_loadconfig(&shapes);
  }
  ~TileUse() { _tile_release(); }
  TileUse(const TileUse&) = delete;
  TileUse& operator=(const TileUse&) = delete;
};

}  // namespace
}  // namespace hmoe
