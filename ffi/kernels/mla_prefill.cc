#include "kernels/mla_prefill.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "codec/bf16.h"
#include "codec/codec.h"

namespace hmoe {
namespace {

// Positions whose keys and values of one head are in memory at once: 330 KB for DeepSeek-V3.
constexpr int64_t kChunk = 512;
constexpr int64_t kChunkPanels = kChunk / kPanel;

// From row to row of what is as wide as a chunk: a cache line more, since rows 2 KB apart share two sets of
// the L1.
constexpr int64_t kFloatStride = kChunk + 16, kHalfStride = kChunk + 32;

// Queries that are multiplied together: the rows of two tiles.
constexpr int64_t kQueries = 32;

// Tiles of the transpose of rows [count, cols]: as MlaKernels::interleave with rows and columns exchanged.
// Plain code: it moves pairs, and what it prepares is multiplied many times.
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

// What all heads share of a chunk of the context.
struct Chunk {
  int64_t begin, count;  // positions
  uint16_t* rows;        // [kChunk, rank]
  uint16_t* rope;        // [kChunk, rope]
  uint16_t* rank_tiles;  // of their transpose, [rank, kChunk]
  uint16_t* rope_tiles;  // of the rotated parts' transpose, [rope, kChunk]
};

// Memory of one thread.
struct Workspace {
  uint16_t* key;           // [nope, rank]
  uint16_t* padded;        // 16 rows of the value
  uint16_t* value_tiles;   // of the transpose, [rank, value]
  uint16_t* queries;       // [tokens, nope + rope]
  float* expanded;         // keys' transpose [nope, kChunk], or values [kChunk, value]
  uint16_t* key_tiles;     // [nope + rope, kChunk]
  uint16_t* chunk_values;  // tiles of [kChunk, value]
  float* scores;           // [kQueries, kChunk]
  uint16_t* p;             // the same, rounded
  float* mixed;            // [tokens + kQueries, value]: sums so far, and those of a chunk
  float *best, *total;     // [tokens]
};

// One call, in two phases: the context's chunks, then head by head everything else.
class Call {
 public:
  Call(const MlaKernels& kernels, const MlaAttentionArgs& args, ThreadPool::Session& session);
  void Run();

 private:
  Chunk TakeChunk(int64_t begin, int64_t end);
  Workspace TakeWorkspace();
  void ReadLatents(const Chunk& chunk, int64_t panel) const;
  void Attend(int64_t head, const Workspace& space) const;
  void LoadHead(int64_t head, const Workspace& space) const;
  void ExpandChunk(const Chunk& chunk, const Workspace& space) const;
  void AttendQueries(const Chunk& chunk, int64_t first, const Workspace& space) const;
  void AddRow(int64_t token, float best, float total, const float* mixed, const Workspace& space) const;
  void StoreHead(int64_t head, const Workspace& space) const;

  const MlaKernels& kernels_;
  const MlaAttentionArgs& args_;
  ThreadPool::Session& session_;
  const int64_t nope_, rope_, rank_, value_, tokens_;  // padded
  std::vector<Chunk> chunks_;
  std::vector<Workspace> spaces_;
};

Call::Call(const MlaKernels& kernels, const MlaAttentionArgs& args, ThreadPool::Session& session)
    : kernels_(kernels),
      args_(args),
      session_(session),
      nope_(RoundUp(args.nope_dim, kDepth)),
      rope_(RoundUp(args.rope_dim, kDepth)),
      rank_(RoundUp(args.rank, kDepth)),
      value_(RoundUp(args.value_dim, kPanel)),
      tokens_(RoundUp(args.tokens, kQueries)) {
  const int64_t length = *std::max_element(args.positions, args.positions + args.tokens) + 1;
  for (int64_t begin = 0; begin < length; begin += kChunk)
    chunks_.push_back(TakeChunk(begin, std::min(begin + kChunk, length)));
  for (int64_t i = 0; i < std::min<int64_t>(session.num_threads(), args.heads); ++i)
    spaces_.push_back(TakeWorkspace());
}

Chunk Call::TakeChunk(int64_t begin, int64_t end) {
  Scratch& scratch = session_.scratch();
  return {begin,
          end - begin,
          scratch.Take<uint16_t>(kChunk * rank_),
          scratch.Take<uint16_t>(kChunk * rope_),
          scratch.Take<uint16_t>(kChunk * rank_),
          scratch.Take<uint16_t>(kChunk * rope_)};
}

Workspace Call::TakeWorkspace() {
  Scratch& scratch = session_.scratch();
  Workspace space;
  space.key = scratch.Take<uint16_t>(nope_ * rank_);
  space.padded = scratch.Take<uint16_t>(kPanel * rank_);
  std::fill_n(space.padded, kPanel * rank_, uint16_t{0});
  space.value_tiles = scratch.Take<uint16_t>(rank_ * value_);
  space.queries = scratch.Take<uint16_t>(tokens_ * (nope_ + rope_));
  space.expanded = scratch.Take<float>(std::max(nope_ * kFloatStride, kChunk * value_));
  space.key_tiles = scratch.Take<uint16_t>(kChunk * (nope_ + rope_));
  space.chunk_values = scratch.Take<uint16_t>(kChunk * value_);
  space.scores = scratch.Take<float>(kQueries * kFloatStride);
  space.p = scratch.Take<uint16_t>(kQueries * kHalfStride);
  space.mixed = scratch.Take<float>((tokens_ + kQueries) * value_);
  space.best = scratch.Take<float>(tokens_);
  space.total = scratch.Take<float>(tokens_);
  return space;
}

void Call::Run() {
  session_.Run(std::ssize(chunks_) * kChunkPanels, [this](int64_t task) noexcept {
    ReadLatents(chunks_[static_cast<size_t>(task / kChunkPanels)], task % kChunkPanels);
  });
  std::atomic<int64_t> next{0};
  session_.Run(std::ssize(spaces_), [&](int64_t task) noexcept {
    for (int64_t head; (head = next.fetch_add(1, std::memory_order_relaxed)) < args_.heads;)
      Attend(head, spaces_[static_cast<size_t>(task)]);
  });
}

// Sixteen positions; zeros behind the last one that any token sees.
void Call::ReadLatents(const Chunk& chunk, int64_t panel) const {
  const int64_t width = args_.rank + args_.rope_dim, first = panel * kPanel;
  uint16_t* rows = chunk.rows + first * rank_;
  uint16_t* rope = chunk.rope + first * rope_;
  std::fill_n(rope, kPanel * rope_, uint16_t{0});
  std::fill_n(rows, kPanel * rank_, uint16_t{0});
  const int64_t count = std::clamp<int64_t>(chunk.count - first, 0, kPanel);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = chunk.begin + first + i;
    const int64_t page = args_.tables[position / args_.page_size];
    const uint16_t* latent = args_.cache + (page * args_.page_size + position % args_.page_size) * width;
    std::copy_n(latent, args_.rank, rows + i * rank_);
    std::copy_n(latent + args_.rank, args_.rope_dim, rope + i * rope_);
  }
  InterleaveTransposed(rows, rank_, kPanel, rank_, kChunkPanels, panel, chunk.rank_tiles);
  InterleaveTransposed(rope, rope_, kPanel, rope_, kChunkPanels, panel, chunk.rope_tiles);
}

void Call::Attend(int64_t head, const Workspace& space) const {
  LoadHead(head, space);
  for (const Chunk& chunk : chunks_) {
    ExpandChunk(chunk, space);
    for (int64_t first = 0; first < args_.tokens; first += kQueries) AttendQueries(chunk, first, space);
  }
  StoreHead(head, space);
}

void Call::LoadHead(int64_t head, const Workspace& space) const {
  const uint16_t* key = args_.key + head * args_.nope_dim * args_.rank;
  std::fill_n(space.key, nope_ * rank_, uint16_t{0});
  for (int64_t n = 0; n < args_.nope_dim; ++n)
    std::copy_n(key + n * args_.rank, args_.rank, space.key + n * rank_);

  const uint16_t* value = args_.value + head * args_.value_dim * args_.rank;
  for (int64_t v = 0; v < args_.value_dim; v += kPanel) {
    const int64_t count = std::min(kPanel, args_.value_dim - v);
    for (int64_t i = 0; i < count; ++i)
      std::copy_n(value + (v + i) * args_.rank, args_.rank, space.padded + i * rank_);
    InterleaveTransposed(space.padded, rank_, count, rank_, value_ / kPanel, v / kPanel, space.value_tiles);
  }

  const int64_t width = nope_ + rope_;
  std::fill_n(space.queries, tokens_ * width, uint16_t{0});
  for (int64_t t = 0; t < args_.tokens; ++t) {
    const int64_t row = t * args_.heads + head;
    std::copy_n(args_.nope + row * args_.nope_dim, args_.nope_dim, space.queries + t * width);
    std::copy_n(args_.rope + row * args_.rope_dim, args_.rope_dim, space.queries + t * width + nope_);
  }
  std::fill_n(space.best, tokens_, -std::numeric_limits<float>::infinity());
  std::fill_n(space.total, tokens_, 0.0f);
}

void Call::ExpandChunk(const Chunk& chunk, const Workspace& space) const {
  kernels_.product(space.key, rank_, nope_, chunk.rank_tiles, kChunkPanels * kTile, kChunkPanels, rank_,
                   space.expanded, kFloatStride, kPanel);
  kernels_.interleave_rounded(space.expanded, kFloatStride, nope_, kChunkPanels, space.key_tiles);
  std::copy_n(chunk.rope_tiles, kChunk * rope_, space.key_tiles + kChunk * nope_);

  const int64_t depth = RoundUp(chunk.count, kDepth), panels = value_ / kPanel;
  kernels_.product(chunk.rows, rank_, depth, space.value_tiles, panels * kTile, panels, rank_, space.expanded,
                   value_, kPanel);
  kernels_.interleave_rounded(space.expanded, value_, depth, panels, space.chunk_values);
}

void Call::AttendQueries(const Chunk& chunk, int64_t first, const Workspace& space) const {
  int64_t visible[kQueries] = {}, most = 0;
  for (int64_t i = 0; i < std::min(kQueries, args_.tokens - first); ++i) {
    visible[i] = std::clamp<int64_t>(args_.positions[first + i] + 1 - chunk.begin, 0, chunk.count);
    most = std::max(most, visible[i]);
  }
  if (most == 0) return;
  const int64_t depth = RoundUp(most, kDepth), width = nope_ + rope_;
  kernels_.product(space.queries + first * width, width, kQueries, space.key_tiles, kChunkPanels * kTile,
                   depth / kPanel, width, space.scores, kFloatStride, kPanel);
  float best[kQueries], total[kQueries];
  for (int64_t i = 0; i < kQueries; ++i) {
    uint16_t* p = space.p + i * kHalfStride;
    if (visible[i] == 0) {
      std::fill_n(p, depth, uint16_t{0});
    } else {
      kernels_.softmax_row(space.scores + i * kFloatStride, visible[i], depth, args_.scale, best + i,
                           total + i, p);
    }
  }
  float* mixed = space.mixed + tokens_ * value_;
  kernels_.product(space.p, kHalfStride, kQueries, space.chunk_values, value_ * kDepth, value_ / kPanel,
                   depth, mixed, value_, kPanel);
  for (int64_t i = 0; i < kQueries; ++i) {
    if (visible[i] != 0) AddRow(first + i, best[i], total[i], mixed + i * value_, space);
  }
}

// Both sides are brought to the larger of the two maxima.
void Call::AddRow(int64_t token, float best, float total, const float* mixed, const Workspace& space) const {
  float* sum = space.mixed + token * value_;
  if (space.total[token] == 0) {
    std::copy_n(mixed, value_, sum);
    space.best[token] = best, space.total[token] = total;
    return;
  }
  const float most = std::max(space.best[token], best);
  const float shares[] = {std::exp(space.best[token] - most), std::exp(best - most)};
  space.best[token] = most;
  space.total[token] = space.total[token] * shares[0] + total * shares[1];
  kernels_.combine(sum, mixed - sum, shares, 2, value_, sum);
}

void Call::StoreHead(int64_t head, const Workspace& space) const {
  for (int64_t t = 0; t < args_.tokens; ++t) {
    uint16_t* out = args_.out + (t * args_.heads + head) * args_.value_dim;
    for (int64_t v = 0; v < args_.value_dim; ++v)
      out[v] = Bf16FromFloat(space.mixed[t * value_ + v] / space.total[t]);
  }
}

}  // namespace

Status MlaPrefill(ThreadPool& pool, const MlaKernels& kernels, const MlaAttentionArgs& args) {
  if (Status s = CheckPages(args, /*shared_table=*/true); !s.ok()) return s;
  if (args.tokens == 0 || args.heads == 0) return {};
  ThreadPool::Session session(pool);
  Call(kernels, args, session).Run();
  return {};
}

}  // namespace hmoe
