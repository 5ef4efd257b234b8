// AMX: a tile of 16 rows times a tile of a panel (32 deep, 16 columns) in one instruction.

#include "kernels/isa/amx/tiles.h"
#include "kernels/mla/avx512_bf16.h"

namespace hmoe {
namespace {

// Four tiles of sums, 2 x 2, take each loaded tile of a factor twice: eight products for eight loads.
template <int kRowTiles, int kPanels>
inline __attribute__((always_inline)) void TileBlock(const uint16_t* a, int64_t a_stride, const uint16_t* b,
                                                     int64_t tile_stride, int64_t depth, float* c,
                                                     int64_t row_stride, int64_t panel_stride) {
  const auto a_bytes = a_stride * static_cast<int64_t>(sizeof *a);
  const auto c_bytes = row_stride * static_cast<int64_t>(sizeof *c);
  FinishStores();
  _tile_zero(0);
  if constexpr (kPanels > 1) _tile_zero(1);
  if constexpr (kRowTiles > 1) _tile_zero(2);
  if constexpr (kRowTiles > 1 && kPanels > 1) _tile_zero(3);
  for (int64_t k = 0; k < depth; k += kDepth, b += tile_stride) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kPanels > 1) {
      _tile_loadd(7, b + kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRowTiles > 1) {
      _tile_loadd(5, a + 16 * a_stride + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kRowTiles > 1 && kPanels > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kPanels > 1) _tile_stored(1, c + panel_stride, c_bytes);
  if constexpr (kRowTiles > 1) _tile_stored(2, c + 16 * row_stride, c_bytes);
  if constexpr (kRowTiles > 1 && kPanels > 1) _tile_stored(3, c + 16 * row_stride + panel_stride, c_bytes);
}

template <int kPanels>
void TileRows(const uint16_t* a, int64_t a_stride, int64_t rows, const uint16_t* b, int64_t tile_stride,
              int64_t depth, float* c, int64_t row_stride, int64_t panel_stride) {
  int64_t i = 0;
  for (; i + 32 <= rows; i += 32)
    TileBlock<2, kPanels>(a + i * a_stride, a_stride, b, tile_stride, depth, c + i * row_stride, row_stride,
                          panel_stride);
  if (i < rows)
    TileBlock<1, kPanels>(a + i * a_stride, a_stride, b, tile_stride, depth, c + i * row_stride, row_stride,
                          panel_stride);
}

void TileProduct(const uint16_t* a, int64_t a_stride, int64_t rows, const uint16_t* tiles,
                 int64_t tile_stride, int64_t num_panels, int64_t depth, float* c, int64_t row_stride,
                 int64_t panel_stride) {
  const TileUse use;
  int64_t p = 0;
  for (; p + 2 <= num_panels; p += 2)
    TileRows<2>(a, a_stride, rows, tiles + p * kTile, tile_stride, depth, c + p * panel_stride, row_stride,
                panel_stride);
  if (p < num_panels)
    TileRows<1>(a, a_stride, rows, tiles + p * kTile, tile_stride, depth, c + p * panel_stride, row_stride,
                panel_stride);
}

constexpr MlaKernels MakeAmx() {
  MlaKernels kernels = MakeMla<Avx512Bf16>();
  kernels.row_multiple = 16;
  kernels.product = TileProduct;
  return kernels;
}

}  // namespace

constinit const MlaKernels kAmxMla = MakeAmx();

}  // namespace hmoe
