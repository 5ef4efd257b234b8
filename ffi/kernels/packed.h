// Activations of many tokens, packed in portions that one call of a kernel takes.
#pragma once

#include <cstdint>
#include <span>

#include "base/scratch.h"
#include "codec/codec.h"
#include "kernels/table.h"

namespace hmoe {

inline int64_t PackedBytes(const CodecKernels& kernels, int64_t tokens, int64_t cols) {
  const int64_t places = tokens <= kernels.tile ? tokens : RoundUp(tokens, kernels.tile);
  return places * RoundUp(cols, kBlock) * kernels.packed_bytes;
}

// Room for `tokens` (at most kMaxTokens) times `cols` activations.
inline PackedTokens TakePacked(Scratch& scratch, const CodecKernels& kernels, int64_t tokens, int64_t cols) {
  return {scratch.Take<uint8_t>(PackedBytes(kernels, tokens, cols)), tokens, RoundUp(cols, kBlock)};
}

}  // namespace hmoe
