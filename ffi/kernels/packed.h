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

// Of how many tokens the portions are into which `tokens` are cut: as few portions as can be, about equal.
inline int64_t PortionTokens(const CodecKernels& kernels, int64_t tokens) {
  return RoundUp(CeilDiv(tokens, CeilDiv(tokens, kernels.most_tokens)), kernels.tile);
}

// Room for `tokens` (at most those of a portion) times `cols` activations, aligned to a page.
inline PackedTokens TakePacked(Scratch& scratch, const CodecKernels& kernels, int64_t tokens, int64_t cols) {
  constexpr uintptr_t kPage = 4096;
  auto* room = scratch.Take<uint8_t>(PackedBytes(kernels, tokens, cols) + static_cast<int64_t>(kPage));
  room += -reinterpret_cast<uintptr_t>(room) % kPage;
  return {room, tokens, RoundUp(cols, kBlock)};
}

}  // namespace hmoe
