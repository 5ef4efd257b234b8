#include "kernels/moe_experts.h"

#include <algorithm>
#include <chrono>

#include "kernels/packed.h"
#include "kernels/tasks.h"

namespace hmoe {
namespace {

// Pairs of one expert that a kernel takes at once.
struct Portion {
  int64_t begin;        // its first pair
  PackedTokens hidden;  // what goes into gate and up
  PackedTokens inner;   // silu(gate) * up
};

// A thread's own memory while it runs a task.
struct alignas(4096) TaskMemory {
  uint8_t workspace[kWorkspaceBytes];
  float first[kMaxTokens * kMaxRows], second[kMaxTokens * kMaxRows];
  uint16_t rounded[kMaxTokens * kMaxRows];
};

struct Portions {
  const ActiveExpert* active;
  std::span<Portion> portions;

  int64_t tokens() const { return active->end - active->begin; }
};

bool SameTokens(std::span<const Pair> pairs, const Portion& a, const Portion& b) {
  return a.hidden.tokens == b.hidden.tokens &&
         std::equal(&pairs[a.begin], &pairs[a.begin] + a.hidden.tokens, &pairs[b.begin],
                    [](const Pair& x, const Pair& y) { return x.token == y.token; });
}

// One call. Two phases with a barrier after each: all of gate and up, then all of down. Down is cut by output
// rows and not by experts, so a task sums over the experts by itself: no reduction, no atomics, and an order
// that does not depend on the threads.
class Call {
 public:
  Call(ExpertStore& store, int64_t layer, const Routing& routing, float* out, ThreadPool::Session& session)
      : store_(store),
        isa_(*store.isa().kernels),
        kernels_(store.isa().For(store.codec().id)),
        layer_(layer),
        tokens_(routing.tokens),
        out_(out),
        session_(session),
        groups_(GroupByExpert(routing, store.shape().experts, session_.scratch())) {}

  void Run(const uint16_t* hidden) {
    CutIntoPortions();
    Pack(hidden);
    GateAndUp();
    Down();
  }

  int64_t num_experts_read() const { return std::ssize(groups_.experts); }

 private:
  void CutIntoPortions();
  void TakeRoom(Portion& portion);
  void Pack(const uint16_t* hidden);
  void GateAndUp();
  void GateAndUpRows(const Portions& expert, int64_t row_begin, int64_t row_end, TaskMemory& memory);
  void Down();
  void DownRows(const Portions& expert, int64_t row_begin, int64_t row_end, const uint8_t* next,
                TaskMemory& memory);
  RowTasks Cut(int64_t rows, int64_t cols, int64_t matrices) const {
    const int64_t active = std::max<int64_t>(1, std::ssize(groups_.experts));
    const int64_t row_bytes = store_.codec().WeightBytes(1, cols);
    return CutRows({rows, row_bytes, std::ssize(groups_.pairs) / active, matrices}, session_);
  }
  const uint8_t* RowsOf(const Portions& expert, MatrixName name, int64_t row) const {
    const Matrix& matrix = store_.Expert(layer_, expert.active->expert)[name];
    return matrix.weights + store_.codec().WeightBytes(row, matrix.cols);
  }

  ExpertStore& store_;
  const IsaKernels& isa_;
  const CodecKernels& kernels_;
  const int64_t layer_;
  const int64_t tokens_;
  float* const out_;
  ThreadPool::Session& session_;
  const Groups groups_;
  std::span<Portions> experts_;  // ascending, as the sums are made
  std::span<Portion> portions_;  // of all experts
  std::span<const Portion*> to_pack_;
};

void Call::CutIntoPortions() {
  Scratch& scratch = session_.scratch();
  int64_t num_portions = 0;
  for (const ActiveExpert& active : groups_.experts)
    num_portions += CeilDiv(active.end - active.begin, kernels_.most_tokens);
  portions_ = {scratch.Take<Portion>(num_portions), static_cast<size_t>(num_portions)};
  experts_ = {scratch.Take<Portions>(std::ssize(groups_.experts)), groups_.experts.size()};
  to_pack_ = {scratch.Take<const Portion*>(num_portions), 0};
  size_t next = 0;
  for (size_t e = 0; e < experts_.size(); ++e) {
    const ActiveExpert& active = groups_.experts[e];
    const size_t first = next;
    const int64_t tokens = PortionTokens(kernels_, active.end - active.begin);
    for (int64_t begin = active.begin; begin < active.end; begin += tokens) {
      Portion& portion = portions_[next++];
      portion = {begin, {nullptr, std::min(tokens, active.end - begin), 0}, {}};
      TakeRoom(portion);
    }
    experts_[e] = {&active, portions_.subspan(first, next - first)};
  }
}

// Experts of the same tokens share what goes into them: all experts do where there is one token.
void Call::TakeRoom(Portion& portion) {
  Scratch& scratch = session_.scratch();
  const int64_t tokens = portion.hidden.tokens;
  portion.inner = TakePacked(scratch, kernels_, tokens, store_.shape().ffn);
  if (!to_pack_.empty() && SameTokens(groups_.pairs, *to_pack_.back(), portion)) {
    portion.hidden = to_pack_.back()->hidden;
  } else {
    portion.hidden = TakePacked(scratch, kernels_, tokens, store_.shape().hidden);
    to_pack_ = {to_pack_.data(), to_pack_.size() + 1};
    to_pack_.back() = &portion;
  }
}

void Call::Pack(const uint16_t* hidden) {
  const int64_t width = store_.shape().hidden;
  const auto portion = [&](int64_t p) { return to_pack_[static_cast<size_t>(p)]; };
  const auto row = [&](int64_t p, int64_t t) {
    return hidden + groups_.pairs[static_cast<size_t>(portion(p)->begin + t)].token * width;
  };
  PackAll(
      session_, kernels_, std::ssize(to_pack_), width, [&](int64_t p) { return portion(p)->hidden; }, row);
}

void Call::GateAndUp() {
  // The experts with most tokens first, so that no long task is left for the end.
  auto** by_size = session_.scratch().Take<const Portions*>(std::ssize(experts_));
  for (size_t e = 0; e < experts_.size(); ++e) by_size[e] = &experts_[e];
  std::sort(by_size, by_size + experts_.size(), [](const Portions* a, const Portions* b) {
    return a->tokens() != b->tokens() ? a->tokens() > b->tokens() : a < b;
  });

  const StoreShape& shape = store_.shape();
  const RowTasks rows = Cut(shape.ffn, shape.hidden, std::ssize(experts_));
  session_.RunByNode(
      std::ssize(experts_) * rows.per_node(), [&](int node, int64_t task, TaskThread& thread) noexcept {
        const int64_t begin = rows.begin(node, task % rows.per_node()),
                      end = rows.end(node, task % rows.per_node());
        if (begin < end)
          GateAndUpRows(*by_size[task / rows.per_node()], begin, end, *thread.Memory<TaskMemory>(1));
      });
}

void Call::GateAndUpRows(const Portions& expert, int64_t row_begin, int64_t row_end, TaskMemory& memory) {
  const ExpertWeights& weights = store_.Expert(layer_, expert.active->expert);
  const int64_t num_rows = row_end - row_begin;
  float *gate = memory.first, *up = memory.second;
  for (const Portion& portion : expert.portions) {
    const int64_t num_tokens = portion.hidden.tokens;
    kernels_.project(weights[MatrixName::kGate], row_begin, row_end, portion.hidden, gate, num_rows,
                     RowsOf(expert, MatrixName::kUp, row_begin), memory.workspace);
    kernels_.project(weights[MatrixName::kUp], row_begin, row_end, portion.hidden, up, num_rows, nullptr,
                     memory.workspace);
    isa_.swiglu(gate, up, num_tokens * num_rows, memory.rounded);
    const uint16_t* rows[kMaxTokens];
    for (int64_t t = 0; t < num_tokens; ++t) rows[t] = memory.rounded + t * num_rows;
    const int64_t end = row_end == store_.shape().ffn ? portion.inner.cols : row_end;
    kernels_.pack(rows, row_begin, num_rows, end, portion.inner);
  }
}

void Call::Down() {
  const StoreShape& shape = store_.shape();
  const RowTasks rows = Cut(shape.hidden, shape.ffn, 1);
  session_.RunByNode(rows.per_node(), [&](int node, int64_t task, TaskThread& thread) noexcept {
    const int64_t begin = rows.begin(node, task), end = rows.end(node, task);
    if (begin >= end) return;
    for (int64_t t = 0; t < tokens_; ++t)
      std::fill(out_ + t * shape.hidden + begin, out_ + t * shape.hidden + end, 0.0f);
    for (size_t e = 0; e < experts_.size(); ++e) {
      const uint8_t* next =
          e + 1 < experts_.size() ? RowsOf(experts_[e + 1], MatrixName::kDown, begin) : nullptr;
      DownRows(experts_[e], begin, end, next, *thread.Memory<TaskMemory>(1));
    }
  });
}

void Call::DownRows(const Portions& expert, int64_t row_begin, int64_t row_end, const uint8_t* next,
                    TaskMemory& memory) {
  const Matrix& down = store_.Expert(layer_, expert.active->expert)[MatrixName::kDown];
  const int64_t num_rows = row_end - row_begin;
  float* projected = memory.first;
  for (const Portion& portion : expert.portions) {
    const bool is_last = &portion == &expert.portions.back();
    kernels_.project(down, row_begin, row_end, portion.inner, projected, num_rows, is_last ? next : nullptr,
                     memory.workspace);
    for (int64_t t = 0; t < portion.inner.tokens; ++t) {
      const Pair& pair = groups_.pairs[static_cast<size_t>(portion.begin + t)];
      isa_.add_scaled(pair.weight, projected + t * num_rows, num_rows,
                      out_ + pair.token * store_.shape().hidden + row_begin);
    }
  }
}

}  // namespace

Status MoeExperts(ExpertStore& store, int64_t layer, const uint16_t* hidden, const Routing& routing,
                  float* out) {
  const auto reading = store.Read();
  if (!reading.ok()) return reading.error();
  if (layer < 0 || layer >= store.shape().layers) {
    return Fail("layer: expected 0 <= layer < ", store.shape().layers, ", got ", layer);
  }
  if (Status checked = CheckRouting(routing, store.shape().experts); !checked.ok()) return checked;
  if (routing.tokens == 0) return {};

  ThreadPool::Session session(store.pool());
  const auto start = std::chrono::steady_clock::now();
  Call call(store, layer, routing, out, session);
  call.Run(hidden);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  store.CountCall(call.num_experts_read(), elapsed.count());
  return store.CheckIntact();
}

}  // namespace hmoe
