#include "kernels/mla_expansion.h"

#include <atomic>
#include <cstring>

namespace hmoe {
namespace {

// Tiles of the transpose of rows [count, cols]: as MlaKernels::interleave with rows and columns exchanged.
// Plain code, which moves pairs: what it prepares is multiplied with all positions of a call.
void InterleaveTransposed(const uint16_t* rows, int64_t stride, int64_t count, int64_t depth,
                          int64_t num_panels, int64_t panel, uint16_t* tiles) {
  for (int64_t k = 0; k < depth; k += 2) {
    uint16_t* to = tiles + (k / kDepth * num_panels + panel) * kTile + k % kDepth * kPanel;
    for (int64_t i = 0; i < kPanel; ++i, to += 2) {
      if (i < count) {
        std::memcpy(to, rows + i * stride + k, 2 * sizeof *to);
      } else {
        std::memset(to, 0, 2 * sizeof *to);
      }
    }
  }
}

}  // namespace

MlaWidths::MlaWidths(const MlaAttentionArgs& args)
    : nope(RoundUp(args.nope_dim, kDepth)),
      rope(RoundUp(args.rope_dim, kDepth)),
      rank(RoundUp(args.rank, kDepth)),
      value(RoundUp(args.value_dim, kPanel)) {}

MlaExpansion::MlaExpansion(const MlaKernels& kernels, const MlaAttentionArgs& args,
                           ThreadPool::Session& session, int64_t begin, int64_t end)
    : kernels_(kernels), args_(args), session_(session), widths_(args), end_(end) {
  Scratch& scratch = session.scratch();
  for (int64_t from = begin / kDepth * kDepth; from < end; from = (from / kMlaChunk + 1) * kMlaChunk) {
    const int64_t chunk = from / kMlaChunk;
    const int64_t count = std::min((chunk + 1) * kMlaChunk, RoundUp(end, kDepth)) - from;
    latents_.push_back(
        {chunk, from % kMlaChunk / kPanel, count / kPanel, scratch.Take<uint16_t>(count * widths_.rank),
         scratch.Take<uint16_t>(count * widths_.rope), scratch.Take<uint16_t>(count * widths_.rank),
         scratch.Take<uint16_t>(count * widths_.rope)});
  }
}

MlaExpansion::Workspace MlaExpansion::TakeWorkspace() const {
  Scratch& scratch = session_.scratch();
  Workspace space;
  if (PadsKey()) {
    space.padded_key = scratch.Take<uint16_t>(widths_.nope * widths_.rank);
    std::fill_n(space.padded_key, widths_.nope * widths_.rank, uint16_t{0});
  }
  space.padded = scratch.Take<uint16_t>(kPanel * widths_.rank);
  std::fill_n(space.padded, kPanel * widths_.rank, uint16_t{0});
  space.value_tiles = scratch.Take<uint16_t>(widths_.rank * widths_.value);
  space.expanded = scratch.Take<float>(std::max(widths_.nope * kMlaStride, kMlaChunk * widths_.value));
  return space;
}

void MlaExpansion::ReadLatents() {
  session_.Run(std::ssize(latents_) * kMlaChunkPanels, [this](int64_t task) noexcept {
    const Latents& latents = latents_[static_cast<size_t>(task / kMlaChunkPanels)];
    const int64_t panel = task % kMlaChunkPanels;
    if (panel < latents.num_panels) ReadPanel(latents, panel);
  });
}

// Sixteen positions; zeros from `end` on.
void MlaExpansion::ReadPanel(const Latents& latents, int64_t panel) const {
  const int64_t width = args_.rank + args_.rope_dim, first = panel * kPanel;
  const int64_t begin = latents.chunk * kMlaChunk + latents.first_panel * kPanel + first;
  uint16_t* rows = latents.rows + first * widths_.rank;
  uint16_t* rope = latents.rope + first * widths_.rope;
  std::fill_n(rows, kPanel * widths_.rank, uint16_t{0});
  std::fill_n(rope, kPanel * widths_.rope, uint16_t{0});
  const int64_t count = std::clamp<int64_t>(end_ - begin, 0, kPanel);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = begin + i, page = args_.tables[position / args_.page_size];
    const uint16_t* latent = args_.cache + (page * args_.page_size + position % args_.page_size) * width;
    std::copy_n(latent, args_.rank, rows + i * widths_.rank);
    std::copy_n(latent + args_.rank, args_.rope_dim, rope + i * widths_.rope);
  }
  InterleaveTransposed(rows, widths_.rank, kPanel, widths_.rank, latents.num_panels, panel,
                       latents.rank_tiles);
  InterleaveTransposed(rope, widths_.rope, kPanel, widths_.rope, latents.num_panels, panel,
                       latents.rope_tiles);
}

void MlaExpansion::LoadHead(int64_t head, Workspace& space) const {
  space.key = args_.key + head * args_.nope_dim * args_.rank;
  if (PadsKey()) {
    for (int64_t n = 0; n < args_.nope_dim; ++n)
      std::copy_n(space.key + n * args_.rank, args_.rank, space.padded_key + n * widths_.rank);
    space.key = space.padded_key;
  }

  const uint16_t* value = args_.value + head * args_.value_dim * args_.rank;
  for (int64_t v = 0; v < args_.value_dim; v += kPanel) {
    const int64_t count = std::min(kPanel, args_.value_dim - v);
    for (int64_t i = 0; i < count; ++i)
      std::copy_n(value + (v + i) * args_.rank, args_.rank, space.padded + i * widths_.rank);
    InterleaveTransposed(space.padded, widths_.rank, count, widths_.rank, widths_.value / kPanel, v / kPanel,
                         space.value_tiles);
  }
}

void MlaExpansion::Expand(const Latents& latents, const Workspace& space, const MlaChunk& to) const {
  const int64_t num_panels = latents.num_panels, offset = latents.first_panel * kTile;
  constexpr int64_t kSlab = kMlaChunkPanels * kTile;  // kDepth rows of keys, of all positions
  kernels_.product(space.key, widths_.rank, widths_.nope, latents.rank_tiles, num_panels * kTile, num_panels,
                   widths_.rank, space.expanded, kMlaStride, kPanel);
  for (int64_t k = 0; k < widths_.nope; k += kDepth)
    kernels_.interleave_rounded(space.expanded + k * kMlaStride, kMlaStride, kDepth, num_panels,
                                to.keys + k / kDepth * kSlab + offset);
  uint16_t* rope = to.keys + widths_.nope / kDepth * kSlab + offset;
  for (int64_t k = 0; k < widths_.rope; k += kDepth)
    std::copy_n(latents.rope_tiles + k * num_panels * kPanel, num_panels * kTile, rope + k / kDepth * kSlab);

  const int64_t panels = widths_.value / kPanel;
  kernels_.product(latents.rows, widths_.rank, num_panels * kPanel, space.value_tiles, panels * kTile, panels,
                   widths_.rank, space.expanded, widths_.value, kPanel);
  kernels_.interleave_rounded(space.expanded, widths_.value, num_panels * kPanel, panels,
                              to.values + latents.first_panel * kPanel * widths_.value);
}

Status CheckExpanded(const MlaAttentionArgs& args, const MlaExpanded& expanded) {
  const int64_t held = expanded.num_chunks * kMlaChunk;
  for (int64_t t = 0; t < args.tokens; ++t) {
    if (args.positions[t] < 0 || args.positions[t] >= held) {
      return Fail("positions[", t, "]: expected 0 <= position < ", held,
                  ", which the expanded context holds, got ", args.positions[t]);
    }
  }
  return {};
}

Status MlaExpand(ThreadPool& pool, const MlaKernels& kernels, const MlaAttentionArgs& args,
                 const MlaExpanded& expanded) {
  if (Status s = CheckPages(args, /*shared_table=*/true); !s.ok()) return s;
  if (Status s = CheckExpanded(args, expanded); !s.ok()) return s;
  if (args.tokens == 0 || args.heads == 0) return {};
  const auto [least, most] = std::minmax_element(args.positions, args.positions + args.tokens);
  ThreadPool::Session session(pool);
  MlaExpansion expansion(kernels, args, session, *least, *most + 1);
  std::vector<MlaExpansion::Workspace> spaces;
  for (int64_t i = 0; i < std::min<int64_t>(session.num_threads(), args.heads); ++i)
    spaces.push_back(expansion.TakeWorkspace());
  expansion.ReadLatents();
  const MlaWidths widths(args);
  std::atomic<int64_t> next{0};
  session.Run(std::ssize(spaces), [&](int64_t task) noexcept {
    MlaExpansion::Workspace& space = spaces[static_cast<size_t>(task)];
    for (int64_t head; (head = next.fetch_add(1, std::memory_order_relaxed)) < args.heads;) {
      expansion.LoadHead(head, space);
      for (const auto& latents : expansion.latents())
        expansion.Expand(latents, space, expanded.At(widths, head, latents.chunk));
    }
  });
  return {};
}

}  // namespace hmoe
