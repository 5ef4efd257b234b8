#include "kernels/mla_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "codec/bf16.h"
#include "codec/codec.h"

namespace hmoe {
namespace {

// Positions whose scores are in memory at once: 590 KB of latents and as much in panels, in a 2 MB L2.
constexpr int64_t kChunk = 512;

// Chunks of a sequence are spread over so many tasks at most, so that their results (heads x rank floats
// each, 256 KB for DeepSeek-V3) do not outgrow the cache they are made from.
constexpr int64_t kMaxParts = 16;

// Columns of scores that are multiplied together: two panels, as many as the tiles of AMX hold beside 32
// rows.
constexpr int64_t kHeadPanels = 2;
constexpr int64_t kHeadBlock = kHeadPanels * kPanel;

// A run of chunks of one sequence: the work of one task.
struct Part {
  int64_t token, begin, end;  // positions
};

// Memory of one thread.
struct Workspace {
  uint16_t* rows;   // latents of a chunk, or queries of a head
  uint16_t* tiles;  // the same latents, or a head's key
  uint16_t* p;      // [kHeadBlock, kChunk]
  float* scores;    // [kHeadPanels, kChunk, kPanel]
  float* mixed;     // [kHeadBlock, rank]
};

// One call, in phases with a barrier after each: queries into the space of latents, head by head, and from
// rows to tiles; softmax and mixture, part by part; the parts of a sequence together and out of the space of
// latents, head by head.
class Call {
 public:
  Call(const MlaKernels& kernels, const MlaAttentionArgs& args, ThreadPool::Session& session);
  void Run();

 private:
  template <typename F>
  void ForEach(int64_t count, F&& work);

  void Absorb(int64_t head, const Workspace& space);
  void PackQueries(int64_t token, int64_t head);
  void Attend(int64_t index, const Workspace& space);
  void Gather(const Part& chunk, int64_t depth, const Workspace& space) const;
  void AttendHeads(int64_t index, int64_t head, int64_t count, int64_t depth, bool is_first,
                   const Workspace& space);
  void Merge(int64_t index, int64_t head, const float* best, const float* total, const float* mixed);
  void Expand(int64_t head, const Workspace& space);
  void CombineParts(int64_t token, int64_t head, float* mixed) const;

  const MlaKernels& kernels_;
  const MlaAttentionArgs& args_;
  ThreadPool::Session& session_;
  const int64_t rank_, width_, nope_, heads_, tokens_;  // padded
  const int64_t rank_panels_;
  std::vector<Part> parts_;          // those of a token follow each other
  std::vector<int64_t> first_part_;  // of each token, and the end
  std::vector<Workspace> spaces_;
  uint16_t* absorbed_;    // [tokens, heads, width]
  uint16_t* queries_;     // [tokens], tiles of [width, heads]
  float *best_, *total_;  // [parts, heads]
  float* mixed_;          // [parts, heads, rank]
};

Call::Call(const MlaKernels& kernels, const MlaAttentionArgs& args, ThreadPool::Session& session)
    : kernels_(kernels),
      args_(args),
      session_(session),
      rank_(RoundUp(args.rank, kDepth)),
      width_(RoundUp(args.rank + args.rope_dim, kDepth)),
      nope_(RoundUp(args.nope_dim, kDepth)),
      heads_(RoundUp(args.heads, kHeadBlock)),
      tokens_(RoundUp(args.tokens, kPanel)),
      rank_panels_(CeilDiv(args.rank, kPanel)) {
  for (int64_t t = 0; t < args.tokens; ++t) {
    first_part_.push_back(std::ssize(parts_));
    const int64_t length = args.positions[t] + 1;
    const int64_t step = CeilDiv(CeilDiv(length, kChunk), kMaxParts) * kChunk;
    for (int64_t begin = 0; begin < length; begin += step)
      parts_.push_back({t, begin, std::min(begin + step, length)});
  }
  first_part_.push_back(std::ssize(parts_));

  Scratch& scratch = session.scratch();
  absorbed_ = scratch.Take<uint16_t>(args.tokens * heads_ * width_);
  queries_ = scratch.Take<uint16_t>(args.tokens * heads_ * width_);
  const int64_t num_sums = std::ssize(parts_) * heads_;
  best_ = scratch.Take<float>(num_sums);
  total_ = scratch.Take<float>(num_sums);
  mixed_ = scratch.Take<float>(num_sums * rank_);
  for (int i = 0; i < session.num_threads(); ++i) {
    spaces_.push_back({
        scratch.Take<uint16_t>(std::max(kChunk * width_, tokens_ * std::max(nope_, rank_))),
        scratch.Take<uint16_t>(rank_ * std::max(kChunk, nope_)),
        scratch.Take<uint16_t>(kHeadBlock * kChunk),
        scratch.Take<float>(std::max(kHeadPanels * kPanel * kChunk, tokens_ * args.value_dim)),
        scratch.Take<float>(std::max(kHeadBlock, tokens_) * rank_),
    });
  }
}

void Call::Run() {
  ForEach(heads_, [this](int64_t head, const Workspace& space) { Absorb(head, space); });
  const int64_t panels = heads_ / kPanel;
  session_.Run(args_.tokens * panels,
               [&](int64_t task) noexcept { PackQueries(task / panels, task % panels * kPanel); });
  ForEach(std::ssize(parts_), [this](int64_t part, const Workspace& space) { Attend(part, space); });
  ForEach(args_.heads, [this](int64_t head, const Workspace& space) { Expand(head, space); });
}

// work(item, workspace) for every item: as many tasks as threads, so that each has a workspace to itself.
template <typename F>
void Call::ForEach(int64_t count, F&& work) {
  std::atomic<int64_t> next{0};
  session_.Run(std::min<int64_t>(count, std::ssize(spaces_)), [&](int64_t task) noexcept {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
      work(i, spaces_[static_cast<size_t>(task)]);
  });
}

// Heads that are only padding get queries of zero: their scores are finite, and nobody asks for their output.
void Call::Absorb(int64_t head, const Workspace& space) {
  for (int64_t t = 0; t < args_.tokens; ++t)
    std::fill_n(absorbed_ + (t * heads_ + head) * width_, width_, uint16_t{0});
  if (head >= args_.heads) return;
  const int64_t rows = RoundUp(args_.tokens, kernels_.row_multiple);
  std::fill_n(space.rows, rows * nope_, uint16_t{0});
  for (int64_t t = 0; t < args_.tokens; ++t) {
    const uint16_t* query = args_.nope + (t * args_.heads + head) * args_.nope_dim;
    std::copy_n(query, args_.nope_dim, space.rows + t * nope_);
  }
  const uint16_t* key = args_.key + head * args_.nope_dim * args_.rank;
  kernels_.interleave(key, args_.rank, args_.nope_dim, args_.rank, nope_, space.tiles);
  kernels_.product(space.rows, nope_, rows, space.tiles, rank_panels_ * kTile, rank_panels_, nope_,
                   space.mixed, rank_, kPanel);
  for (int64_t t = 0; t < args_.tokens; ++t) {
    uint16_t* query = absorbed_ + (t * heads_ + head) * width_;
    for (int64_t r = 0; r < args_.rank; ++r) query[r] = Bf16FromFloat(space.mixed[t * rank_ + r]);
    std::copy_n(args_.rope + (t * args_.heads + head) * args_.rope_dim, args_.rope_dim, query + args_.rank);
  }
}

// A phase of its own: neighbouring heads share the cache lines of a tile.
void Call::PackQueries(int64_t token, int64_t head) {
  const uint16_t* rows = absorbed_ + (token * heads_ + head) * width_;
  uint16_t* tile = queries_ + token * heads_ * width_ + head * kDepth;
  for (int64_t column = 0; column < width_; column += kDepth, tile += heads_ * kDepth) {
    for (int64_t k = 0; k < kDepth; k += 2) {
      for (int64_t i = 0; i < kPanel; ++i)
        std::memcpy(tile + (k * kPanel + 2 * i), rows + i * width_ + column + k, 2 * sizeof *tile);
    }
  }
}

void Call::Attend(int64_t index, const Workspace& space) {
  const Part& part = parts_[static_cast<size_t>(index)];
  for (int64_t begin = part.begin; begin < part.end; begin += kChunk) {
    const Part chunk{part.token, begin, std::min(begin + kChunk, part.end)};
    const int64_t count = chunk.end - chunk.begin, depth = RoundUp(count, kDepth);
    Gather(chunk, depth, space);
    for (int64_t head = 0; head < heads_; head += kHeadBlock)
      AttendHeads(index, head, count, depth, begin == part.begin, space);
  }
}

// The chunk's latents as rows and, without the rotated part, as panels. Behind the last visible position
// there are zeros: an earlier sequence may have left NaN in a page, which a weight of 0 does not stop.
void Call::Gather(const Part& chunk, int64_t depth, const Workspace& space) const {
  const int64_t width = args_.rank + args_.rope_dim, count = chunk.end - chunk.begin;
  const int32_t* table = args_.tables + chunk.token * args_.table_len;
  for (int64_t i = 0; i < count;) {
    const int64_t position = chunk.begin + i, slot = position % args_.page_size;
    const int64_t run = std::min(args_.page_size - slot, count - i);
    const uint16_t* from = args_.cache + (table[position / args_.page_size] * args_.page_size + slot) * width;
    if (width == width_) {
      std::copy_n(from, run * width, space.rows + i * width_);
    } else {
      for (int64_t j = 0; j < run; ++j) {
        uint16_t* row = space.rows + (i + j) * width_;
        std::fill(std::copy_n(from + j * width, width, row), row + width_, uint16_t{0});
      }
    }
    i += run;
  }
  std::fill(space.rows + count * width_, space.rows + depth * width_, uint16_t{0});
  kernels_.interleave(space.rows, width_, count, args_.rank, depth, space.tiles);
}

void Call::AttendHeads(int64_t index, int64_t head, int64_t count, int64_t depth, bool is_first,
                       const Workspace& space) {
  const int64_t token = parts_[static_cast<size_t>(index)].token;
  const uint16_t* queries = queries_ + token * heads_ * width_ + head * kDepth;
  kernels_.product(space.rows, width_, depth, queries, heads_ * kDepth, kHeadPanels, width_, space.scores,
                   kPanel, kChunk * kPanel);
  float best[kHeadBlock], total[kHeadBlock];
  for (int64_t panel = 0; panel < kHeadPanels; ++panel) {
    kernels_.softmax(space.scores + panel * kChunk * kPanel, count, args_.scale, best + panel * kPanel,
                     total + panel * kPanel, space.p + panel * kPanel * kChunk, kChunk);
  }
  const int64_t sums = index * heads_ + head;
  float* const mixed = is_first ? mixed_ + sums * rank_ : space.mixed;
  kernels_.product(space.p, kChunk, kHeadBlock, space.tiles, rank_panels_ * kTile, rank_panels_, depth, mixed,
                   rank_, kPanel);
  if (is_first) {
    std::copy_n(best, kHeadBlock, best_ + sums);
    std::copy_n(total, kHeadBlock, total_ + sums);
  } else {
    Merge(index, head, best, total, mixed);
  }
}

// A further chunk of the same part: both sides are brought to the larger of the two maxima.
void Call::Merge(int64_t index, int64_t head, const float* best, const float* total, const float* mixed) {
  for (int64_t i = 0; i < kHeadBlock; ++i) {
    const int64_t place = index * heads_ + head + i;
    const float most = std::max(best_[place], best[i]);
    const float old_share = std::exp(best_[place] - most), new_share = std::exp(best[i] - most);
    best_[place] = most;
    total_[place] = total_[place] * old_share + total[i] * new_share;
    float* sum = mixed_ + place * rank_;
    for (int64_t r = 0; r < args_.rank; ++r) sum[r] = sum[r] * old_share + mixed[i * rank_ + r] * new_share;
  }
}

void Call::Expand(int64_t head, const Workspace& space) {
  std::fill_n(space.rows, args_.tokens * rank_, uint16_t{0});
  for (int64_t t = 0; t < args_.tokens; ++t) {
    CombineParts(t, head, space.mixed);
    for (int64_t r = 0; r < args_.rank; ++r) space.rows[t * rank_ + r] = Bf16FromFloat(space.mixed[r]);
  }
  const uint16_t* value = args_.value + head * args_.value_dim * args_.rank;
  kernels_.dot_rows(value, args_.value_dim, args_.rank, space.rows, rank_, args_.tokens, space.scores,
                    args_.value_dim);
  for (int64_t t = 0; t < args_.tokens; ++t) {
    uint16_t* out = args_.out + (t * args_.heads + head) * args_.value_dim;
    for (int64_t v = 0; v < args_.value_dim; ++v)
      out[v] = Bf16FromFloat(space.scores[t * args_.value_dim + v]);
  }
}

void Call::CombineParts(int64_t token, int64_t head, float* mixed) const {
  const int64_t first = first_part_[static_cast<size_t>(token)];
  const int64_t count = first_part_[static_cast<size_t>(token) + 1] - first;
  const auto place = [&](int64_t i) { return (first + i) * heads_ + head; };
  float most = best_[place(0)], total = 0, shares[kMaxParts];
  for (int64_t i = 1; i < count; ++i) most = std::max(most, best_[place(i)]);
  for (int64_t i = 0; i < count; ++i) {
    shares[i] = std::exp(best_[place(i)] - most);
    total += total_[place(i)] * shares[i];
  }
  for (int64_t i = 0; i < count; ++i) shares[i] /= total;
  kernels_.combine(mixed_ + place(0) * rank_, heads_ * rank_, shares, count, RoundUp(args_.rank, kPanel),
                   mixed);
}

}  // namespace

Status CheckPages(const MlaAttentionArgs& args, bool shared_table) {
  const int64_t covered = args.table_len * args.page_size;
  int64_t num_checked = 0;  // pages of a shared table that are known to be there
  for (int64_t t = 0; t < args.tokens; ++t) {
    const int64_t position = args.positions[t], row = shared_table ? 0 : t;
    if (position < 0 || position >= covered) {
      return Fail("positions[", t, "]: expected 0 <= position < ", covered, ", which the table covers, got ",
                  position);
    }
    if (!shared_table) num_checked = 0;
    for (; num_checked <= position / args.page_size; ++num_checked) {
      const int64_t page = args.tables[row * args.table_len + num_checked];
      if (page < 0 || page >= args.num_pages) {
        return Fail("tables[", row, ", ", num_checked, "]: expected 0 <= page < ", args.num_pages, ", got ",
                    page);
      }
    }
  }
  return {};
}

Status MlaAttention(ThreadPool& pool, const MlaKernels& kernels, const MlaAttentionArgs& args) {
  if (Status s = CheckPages(args, /*shared_table=*/false); !s.ok()) return s;
  if (args.tokens == 0 || args.heads == 0) return {};
  ThreadPool::Session session(pool);
  Call(kernels, args, session).Run();
  return {};
}

}  // namespace hmoe
