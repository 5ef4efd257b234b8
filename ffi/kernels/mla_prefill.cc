#include "kernels/mla_prefill.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "codec/bf16.h"
#include "codec/codec.h"

namespace hmoe {
namespace {

// As kMlaStride, of bfloat16.
constexpr int64_t kHalfStride = kMlaChunk + 32;

// Queries that are multiplied together at most: the rows of two tiles.
constexpr int64_t kQueries = 32;

// Memory of one thread, for a head at a time.
struct Workspace {
  uint16_t* queries;    // [tokens, nope + rope]
  float* scores;        // [kQueries, kMlaChunk]
  uint16_t* p;          // the same, rounded
  float* mixed;         // [tokens + kQueries, value]: sums so far, and those of a chunk
  float *best, *total;  // [tokens]
};

// Attention of all tokens, head by head and chunk by chunk.
class Attention {
 public:
  Attention(const MlaKernels& kernels, const MlaAttentionArgs& args, ThreadPool::Session& session)
      : kernels_(kernels),
        args_(args),
        session_(session),
        widths_(args),
        tokens_(RoundUp(args.tokens, kQueries)),
        length_(*std::max_element(args.positions, args.positions + args.tokens) + 1) {}

  int64_t length() const { return length_; }
  Workspace TakeWorkspace() const;
  void LoadHead(int64_t head, const Workspace& space) const;
  void Meet(int64_t index, const MlaChunk& chunk, const Workspace& space) const;
  void StoreHead(int64_t head, const Workspace& space) const;

  // Calls work(head, task) for all heads; `num_tasks` of them at once.
  template <typename F>
  void ForEachHead(int64_t num_tasks, F&& work) const;

 private:
  void MeetQueries(int64_t index, const MlaChunk& chunk, int64_t first, const Workspace& space) const;
  void AddRow(int64_t token, float best, float total, const float* mixed, const Workspace& space) const;

  const MlaKernels& kernels_;
  const MlaAttentionArgs& args_;
  ThreadPool::Session& session_;
  const MlaWidths widths_;
  const int64_t tokens_;  // padded
  const int64_t length_;  // of the context
};

Workspace Attention::TakeWorkspace() const {
  Scratch& scratch = session_.scratch();
  Workspace space;
  space.queries = scratch.Take<uint16_t>(tokens_ * (widths_.nope + widths_.rope));
  space.scores = scratch.Take<float>(kQueries * kMlaStride);
  space.p = scratch.Take<uint16_t>(kQueries * kHalfStride);
  space.mixed = scratch.Take<float>((tokens_ + kQueries) * widths_.value);
  space.best = scratch.Take<float>(tokens_);
  space.total = scratch.Take<float>(tokens_);
  return space;
}

template <typename F>
void Attention::ForEachHead(int64_t num_tasks, F&& work) const {
  std::atomic<int64_t> next{0};
  session_.Run(num_tasks, [&](int64_t task) noexcept {
    for (int64_t head; (head = next.fetch_add(1, std::memory_order_relaxed)) < args_.heads;) work(head, task);
  });
}

void Attention::LoadHead(int64_t head, const Workspace& space) const {
  const int64_t width = widths_.nope + widths_.rope;
  std::fill_n(space.queries, tokens_ * width, uint16_t{0});
  for (int64_t t = 0; t < args_.tokens; ++t) {
    const int64_t row = t * args_.heads + head;
    uint16_t* query = space.queries + t * width;
    std::copy_n(args_.nope + row * args_.nope_dim, args_.nope_dim, query);
    std::copy_n(args_.rope + row * args_.rope_dim, args_.rope_dim, query + widths_.nope);
  }
  std::fill_n(space.best, tokens_, -std::numeric_limits<float>::infinity());
  std::fill_n(space.total, tokens_, 0.0f);
}

void Attention::Meet(int64_t index, const MlaChunk& chunk, const Workspace& space) const {
  for (int64_t first = 0; first < args_.tokens; first += kQueries) MeetQueries(index, chunk, first, space);
}

void Attention::MeetQueries(int64_t index, const MlaChunk& chunk, int64_t first,
                            const Workspace& space) const {
  const int64_t count = std::min(kQueries, args_.tokens - first), rows = RoundUp(count, kPanel);
  int64_t visible[kQueries] = {}, most = 0;
  for (int64_t i = 0; i < count; ++i) {
    visible[i] = std::clamp<int64_t>(args_.positions[first + i] + 1 - index * kMlaChunk, 0, kMlaChunk);
    most = std::max(most, visible[i]);
  }
  if (most == 0) return;
  const int64_t depth = RoundUp(most, kDepth), width = widths_.nope + widths_.rope;
  kernels_.product(space.queries + first * width, width, rows, chunk.keys, kMlaChunkPanels * kTile,
                   depth / kPanel, width, space.scores, kMlaStride, kPanel);
  float best[kQueries], total[kQueries];
  for (int64_t i = 0; i < rows; ++i) {
    uint16_t* p = space.p + i * kHalfStride;
    if (visible[i] == 0) {
      std::fill_n(p, depth, uint16_t{0});
    } else {
      kernels_.softmax_row(space.scores + i * kMlaStride, visible[i], depth, args_.scale, best + i, total + i,
                           p);
    }
  }
  float* mixed = space.mixed + tokens_ * widths_.value;
  kernels_.product(space.p, kHalfStride, rows, chunk.values, widths_.value * kDepth, widths_.value / kPanel,
                   depth, mixed, widths_.value, kPanel);
  for (int64_t i = 0; i < count; ++i) {
    if (visible[i] != 0) AddRow(first + i, best[i], total[i], mixed + i * widths_.value, space);
  }
}

// Both sides are brought to the larger of the two maxima.
void Attention::AddRow(int64_t token, float best, float total, const float* mixed,
                       const Workspace& space) const {
  float* sum = space.mixed + token * widths_.value;
  if (space.total[token] == 0) {
    std::copy_n(mixed, widths_.value, sum);
    space.best[token] = best, space.total[token] = total;
    return;
  }
  const float most = std::max(space.best[token], best);
  const float shares[] = {std::exp(space.best[token] - most), std::exp(best - most)};
  space.best[token] = most;
  space.total[token] = space.total[token] * shares[0] + total * shares[1];
  kernels_.combine(sum, mixed - sum, shares, 2, widths_.value, sum);
}

void Attention::StoreHead(int64_t head, const Workspace& space) const {
  for (int64_t t = 0; t < args_.tokens; ++t) {
    uint16_t* out = args_.out + (t * args_.heads + head) * args_.value_dim;
    for (int64_t v = 0; v < args_.value_dim; ++v)
      out[v] = Bf16FromFloat(space.mixed[t * widths_.value + v] / space.total[t]);
  }
}

}  // namespace

Status MlaPrefill(ThreadPool& pool, const MlaKernels& kernels, const MlaAttentionArgs& args) {
  if (Status s = CheckPages(args, /*shared_table=*/true); !s.ok()) return s;
  if (args.tokens == 0 || args.heads == 0) return {};
  ThreadPool::Session session(pool);
  const Attention attention(kernels, args, session);
  const MlaWidths widths(args);
  MlaExpansion expansion(kernels, args, session, 0, attention.length());
  struct Both {
    Workspace queries;
    MlaExpansion::Workspace expanding;
    MlaChunk chunk;
  };
  std::vector<Both> spaces;
  for (int64_t i = 0; i < std::min<int64_t>(session.num_threads(), args.heads); ++i) {
    spaces.push_back({attention.TakeWorkspace(), expansion.TakeWorkspace(),
                      widths.ChunkAt(session.scratch().Take<uint16_t>(widths.words()))});
  }
  expansion.ReadLatents();
  attention.ForEachHead(std::ssize(spaces), [&](int64_t head, int64_t task) {
    Both& space = spaces[static_cast<size_t>(task)];
    attention.LoadHead(head, space.queries);
    expansion.LoadHead(head, space.expanding);
    for (const auto& latents : expansion.latents()) {
      expansion.Expand(latents, space.expanding, space.chunk);
      attention.Meet(latents.chunk, space.chunk, space.queries);
    }
    attention.StoreHead(head, space.queries);
  });
  return {};
}

Status MlaAttendExpanded(ThreadPool& pool, const MlaKernels& kernels, const MlaAttentionArgs& args,
                         const MlaExpanded& expanded) {
  if (Status s = CheckExpanded(args, expanded); !s.ok()) return s;
  if (args.tokens == 0 || args.heads == 0) return {};
  ThreadPool::Session session(pool);
  const Attention attention(kernels, args, session);
  const MlaWidths widths(args);
  std::vector<Workspace> spaces;
  for (int64_t i = 0; i < std::min<int64_t>(session.num_threads(), args.heads); ++i)
    spaces.push_back(attention.TakeWorkspace());
  attention.ForEachHead(std::ssize(spaces), [&](int64_t head, int64_t task) {
    const Workspace& space = spaces[static_cast<size_t>(task)];
    attention.LoadHead(head, space);
    for (int64_t chunk = 0; chunk * kMlaChunk < attention.length(); ++chunk)
      attention.Meet(chunk, expanded.At(widths, head, chunk), space);
    attention.StoreHead(head, space);
  });
  return {};
}

}  // namespace hmoe
