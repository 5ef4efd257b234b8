// What every ISA offers: one table of functions per codec.
#pragma once

#include <cstdint>

#include "kernels/matrix.h"

namespace hmoe {

inline constexpr int64_t kMaxTokens = 256;  // of one call of `project`, with any ISA
inline constexpr int64_t kMaxRows = 256;

// Activations of up to kMaxTokens tokens, packed as an ISA and a codec want them. `cols` is a multiple of
// kBlock. They are best aligned to a page, as a workspace is: a load that has an address's last 12 bits in
// common with an earlier store waits for it, and where memory is the limit kernels store where they do not
// load, counted from the beginning of a page.
struct PackedTokens {
  uint8_t* data = nullptr;
  int64_t tokens = 0;
  int64_t cols = 0;
};

struct CodecKernels {
  // Bytes of one packed activation. PackedTokens are `tokens * cols` of them, where more tokens than a tile
  // count as whole tiles; those that begin at a multiple of `tile` tokens lie behind all earlier ones.
  int64_t packed_bytes;
  int64_t tile;

  // Tokens of one call of `project`, a multiple of `tile`: as many as share the decoding of a weight.
  int64_t most_tokens;

  // Puts the bfloat16 activations of columns [begin, begin + count), which start at rows[t] for token t, into
  // their places, and zeros up to column `end`.
  void (*pack)(const uint16_t* const* rows, int64_t begin, int64_t count, int64_t end,
               const PackedTokens& to);

  // out[t * out_stride + r - row_begin] = row r of the matrix times token t, for up to `most_tokens` tokens
  // and kMaxRows rows. The bits of a result depend on the row and the token alone: not on how many tokens
  // there are and not on the range of rows. `next` is what the caller reads after this, rows of as many bytes
  // each, or null: a kernel may ask memory for it. `workspace` has kWorkspaceBytes, aligned to a page.
  void (*project)(const Matrix& matrix, int64_t row_begin, int64_t row_end, const PackedTokens& tokens,
                  float* out, int64_t out_stride, const uint8_t* next, uint8_t* workspace);

  // The values of `count` weights (a multiple of kBlock), unscaled, through the decode that `project` uses
  // (but for MXFP4 on tiles, whose scales go into the decoded weights).
  void (*decode)(const uint8_t* bytes, int64_t count, float* out);
};

inline constexpr int64_t kWorkspaceBytes = int64_t{1} << 20;

struct IsaKernels {
  CodecKernels codec[8];  // by CodecId

  // out = silu(gate) * up, rounded to bfloat16. The same bits in every ISA.
  void (*swiglu)(const float* gate, const float* up, int64_t count, uint16_t* out);

  // to += weight * from.
  void (*add_scaled)(float weight, const float* from, int64_t count, float* to);

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
extern const IsaKernels kAmxKernels;

}  // namespace hmoe
