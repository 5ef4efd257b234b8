// What every ISA offers: one table of functions per codec.
#pragma once

#include <cstdint>

#include "kernels/matrix.h"

namespace hmoe {

inline constexpr int kMaxTile = 8;  // tokens that one decoded weight is used for

struct CodecKernels {
  // Bytes of one packed activation.
  int64_t packed_bytes;

  // Puts `count` bfloat16 activations, the columns from `begin` (a multiple of 8), into their places in
  // `packed`, and zeros up to column `end` (a multiple of 8). A packed vector holds a multiple of kBlock
  // columns.
  void (*pack)(const uint16_t* activations, int64_t begin, int64_t count, int64_t end, uint8_t* packed);

  // out[t * out_stride + r - row_begin] = row r of the matrix times packed[t], for up to kMaxTile tokens. The
  // bits of a result depend on the row and the activations alone: not on num_tokens and not on the range of
  // rows.
  void (*project)(const Matrix& matrix, int64_t row_begin, int64_t row_end, const uint8_t* const* packed,
                  int64_t num_tokens, float* out, int64_t out_stride);

  // The values of `count` weights (a multiple of kBlock) through the decode that `project` uses, unscaled.
  void (*decode)(const uint8_t* bytes, int64_t count, float* out);
};

struct IsaKernels {
  CodecKernels codec[2];  // indexed by CodecId

  // Reads `bytes` (a multiple of 256) as fast as loads go. The result only keeps the compiler from leaving it
  // out.
  uint64_t (*read)(const uint8_t* memory, int64_t bytes);

  // Multiplies and adds with the dot instruction as fast as registers go; returns how many pairs. `sink` only
  // keeps the compiler from leaving it out.
  int64_t (*multiply_adds)(int64_t rounds, float* sink);
};

// Defined `constinit`: initialisers that run at start would use an ISA before anyone asked for it.
extern const IsaKernels kScalarKernels;
extern const IsaKernels kAvx2Kernels;
extern const IsaKernels kAvx512Kernels;
extern const IsaKernels kAvx512Bf16Kernels;

}  // namespace hmoe
