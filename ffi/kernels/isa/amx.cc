// AMX-BF16: products of tiles, 16 rows of weights x 32 columns with up to 16 tokens.
//
// A tile product takes as long for one token as for sixteen, and a weight is decoded once for all of them, so
// tiles serve every number of tokens: that keeps a token's bits the same in every batch. What changes with it
// is only how many tiles share a load: two of rows with two of tokens are all that eight registers hold, so
// from one tile of tokens on rows are taken in pairs of tiles, and from two on their sums have to wait in
// memory.

#include "kernels/isa/amx/pack.h"
#include "kernels/isa/amx/panel.h"
#include "kernels/isa/amx/strip.h"
#include "kernels/isa/dot_peak.h"

namespace hmoe {
namespace {

template <typename C>
void Project(const Matrix& matrix, int64_t row_begin, int64_t row_end, const PackedTokens& tokens, float* out,
             int64_t out_stride, const uint8_t* next, uint8_t* workspace) {
  static_assert(sizeof(Strip<C>) <= kWorkspaceBytes && sizeof(Panel<C>) <= kWorkspaceBytes);
  auto* strip = reinterpret_cast<Strip<C>*>(workspace);
  if (tokens.tokens <= kTileTokens) {
    strip->template Project<1>(matrix, row_begin, row_end, tokens, out, out_stride, next);
  } else if (tokens.tokens <= 2 * kTileTokens) {
    strip->template Project<2>(matrix, row_begin, row_end, tokens, out, out_stride, next);
  } else {
    auto* panel = reinterpret_cast<Panel<C>*>(workspace);
    panel->Project(matrix, row_begin, row_end, tokens, out, out_stride, next);
  }
}

template <typename C>
struct TileKernels {
  static constexpr CodecKernels Make() {
    static_assert(kChunk % C::template kStep<Tiles> == 0, "a chunk of columns is packed by itself");
    return {sizeof(uint16_t), kTileTokens, kMaxTokens, Pack<C>, Project<C>, DecodeAll<Tiles, C>};
  }
};

uint64_t Read(const uint8_t* memory, int64_t bytes) { return kAvx512Kernels.read(memory, bytes); }

}  // namespace

constinit const IsaKernels kAmxKernels = MakeIsaKernels<TileKernels>(Read, MultiplyAddsOfTiles);

}  // namespace hmoe
