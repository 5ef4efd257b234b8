// Activations of many tokens, packed in portions that one call of a kernel takes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "base/scratch.h"
#include "codec/codec.h"
#include "kernels/table.h"
#include "machine/pool.h"

namespace hmoe {

inline int64_t PackedBytes(const CodecKernels& kernels, int64_t tokens, int64_t cols) {
  const int64_t places = tokens <= kernels.tile ? tokens : RoundUp(tokens, kernels.tile);
  return places * RoundUp(cols, kBlock) * kernels.packed_bytes;
}

// Of how many tokens the portions are into which `tokens`, one at least, are cut: as few portions as can be,
// about equal.
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

// Packs `num_portions` portions: `portion(p)` says where to, `row(p, t)` where the activations of a token of
// it are. Those of many tokens are cut by columns too, so that a single portion occupies all threads.
template <typename PortionOf, typename RowOf>
void PackAll(ThreadPool::Session& session, const CodecKernels& kernels, int64_t num_portions, int64_t cols,
             const PortionOf& portion, const RowOf& row) {
  constexpr int64_t kFewTokens = 16, kPieceColumns = 8 * kBlock;
  int64_t most_tokens = 0;
  for (int64_t p = 0; p < num_portions; ++p) most_tokens = std::max(most_tokens, portion(p).tokens);
  const int64_t pieces = most_tokens > kFewTokens ? CeilDiv(cols, kPieceColumns) : 1;
  session.Run(num_portions * pieces, [&](int64_t task) noexcept {
    const int64_t p = task / pieces, piece = task % pieces;
    const bool is_last = piece + 1 == pieces;
    const int64_t begin = piece * kPieceColumns, end = is_last ? cols : begin + kPieceColumns;
    const PackedTokens to = portion(p);
    const uint16_t* rows[kMaxTokens];
    for (int64_t t = 0; t < to.tokens; ++t) rows[t] = row(p, t) + begin;
    kernels.pack(rows, begin, end - begin, is_last ? to.cols : end, to);
  });
}

}  // namespace hmoe
