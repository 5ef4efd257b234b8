// What every ISA offers to latent attention: small dense products and a softmax, all of bfloat16 in, FP32
// inside.
//
// Matrices come in two shapes. *Rows* are row-major. *Tiles* hold 32 rows of 16 columns each: for every two
// rows the 16 pairs of a column's two values, side by side, which is what tile and pair instructions take as
// the second factor. The tiles of 32 rows follow each other; a *panel* is the tiles of 16 columns.
#pragma once

#include <cstdint>

namespace hmoe {

inline constexpr int64_t kPanel = 16;  // columns of a tile
inline constexpr int64_t kDepth = 32;  // rows of a tile: the length of a sum comes in multiples of it
inline constexpr int64_t kTile = kPanel * kDepth;

struct MlaKernels {
  int64_t row_multiple;  // of `product`: a tile computes as many rows, wanted or not

  // Tiles of the rows [count, cols] (stride in elements): [depth / 32, cols / 16, 16 pairs of rows, 16, 2],
  // with zeros from row `count` to `depth` and from `cols` to the end of the last panel.
  void (*interleave)(const uint16_t* rows, int64_t stride, int64_t count, int64_t cols, int64_t depth,
                     uint16_t* tiles);

  // c[i * row_stride + p * panel_stride + lane] = sum over depth of a[i * a_stride + k] times panel p, whose
  // tiles are `tile_stride` apart; panels are neighbours. Each result depends on its own row and column
  // alone.
  void (*product)(const uint16_t* a, int64_t a_stride, int64_t rows, const uint16_t* tiles,
                  int64_t tile_stride, int64_t num_panels, int64_t depth, float* c, int64_t row_stride,
                  int64_t panel_stride);

  // Of 16 columns of scores [count, 16]: best = scale * max, and p = exp(scale * score - best), whose sum is
  // `total`. p is rounded and written as 16 rows of `p_stride`, with zeros from `count` to a multiple of
  // kDepth.
  void (*softmax)(const float* scores, int64_t count, float scale, float* best, float* total, uint16_t* p,
                  int64_t p_stride);

  // As `interleave`, of FP32 rows that are rounded on the way: depth (a multiple of kDepth) times whole
  // panels.
  void (*interleave_rounded)(const float* rows, int64_t stride, int64_t depth, int64_t num_panels,
                             uint16_t* tiles);

  // Of one row of `count` (at least 1) scores: best, p and total as above, p with zeros from `count` to
  // `depth`.
  void (*softmax_row)(const float* scores, int64_t count, int64_t depth, float scale, float* best,
                      float* total, uint16_t* p);

  // sum[i] = sum over parts j of weights[j] * parts[j * stride + i], for a multiple of 16 values.
  void (*combine)(const float* parts, int64_t stride, const float* weights, int64_t num_parts, int64_t width,
                  float* sum);

  // out[t * out_stride + r] = row r of `rows` [num_rows, cols], without gaps, times x[t * x_stride ...],
  // which has zeros from `cols` to a multiple of kDepth.
  void (*dot_rows)(const uint16_t* rows, int64_t num_rows, int64_t cols, const uint16_t* x, int64_t x_stride,
                   int64_t num_tokens, float* out, int64_t out_stride);
};

extern const MlaKernels kScalarMla;
extern const MlaKernels kAvx2Mla;
extern const MlaKernels kAvx512Mla;
extern const MlaKernels kAvx512Bf16Mla;
extern const MlaKernels kAmxMla;

}  // namespace hmoe
