#include "kernels/moe_experts.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "codec/bf16.h"
#include "kernels/linear.h"
#include "kernels/tasks.h"

namespace hmoe {
namespace {

float Silu(float x) { return x / (1.0f + std::exp(-x)); }

// One call. Two phases with a barrier after each: all of gate and up, then all of down. Down is cut by output
// rows and not by experts, so a task sums over the experts by itself: no reduction, no atomics, and an order
// that does not depend on the threads.
class Call {
 public:
  Call(ExpertStore& store, int64_t layer, const Routing& routing, float* out, ThreadPool::Session& session)
      : store_(store),
        kernels_(store.kernels()),
        layer_(layer),
        tokens_(routing.tokens),
        out_(out),
        session_(session),
        groups_(GroupByExpert(routing, store.shape().experts, session_.scratch())) {}

  void Run(const uint16_t* hidden) {
    packed_ = PackTokens(session_, kernels_, hidden, tokens_, store_.shape().hidden);
    GateAndUp();
    Down();
  }

  int64_t num_experts_read() const { return std::ssize(groups_.experts); }

 private:
  void GateAndUp();
  void GateAndUpRows(const ActiveExpert& active, int64_t row_begin, int64_t row_end);
  void Down();
  void DownRows(const ActiveExpert& active, int64_t row_begin, int64_t row_end);

  ExpertStore& store_;
  const CodecKernels& kernels_;
  const int64_t layer_;
  const int64_t tokens_;
  float* const out_;
  ThreadPool::Session& session_;
  const Groups groups_;
  const uint8_t** packed_ = nullptr;  // per token
  uint8_t* inner_ = nullptr;          // packed silu(gate) * up, per pair
  int64_t inner_stride_ = 0;
  int64_t inner_end_ = 0;  // its columns, padded
};

void Call::GateAndUp() {
  const StoreShape& shape = store_.shape();
  inner_end_ = CeilDiv(shape.ffn, kBlock) * kBlock;
  inner_stride_ = inner_end_ * kernels_.packed_bytes;
  inner_ = session_.scratch().Take<uint8_t>(std::ssize(groups_.pairs) * inner_stride_);

  const int64_t row_bytes = 2 * store_.codec().WeightBytes(1, shape.hidden);
  const int64_t num_active = std::ssize(groups_.experts);
  const RowTasks rows = CutRows(shape.ffn, row_bytes, num_active, session_.num_threads());
  session_.Run(num_active * rows.count(), [&](int64_t task) noexcept {
    const ActiveExpert& active = groups_.experts[static_cast<size_t>(task / rows.count())];
    GateAndUpRows(active, rows.begin(task % rows.count()), rows.end(task % rows.count()));
  });
}

void Call::GateAndUpRows(const ActiveExpert& active, int64_t row_begin, int64_t row_end) {
  const ExpertWeights& expert = store_.Expert(layer_, active.expert);
  const int64_t num_rows = row_end - row_begin;
  const int64_t padded_end = row_end == store_.shape().ffn ? inner_end_ : row_end;
  float gate[kMaxTile * kMaxTaskRows], up[kMaxTile * kMaxTaskRows];
  uint16_t rounded[kMaxTaskRows];
  for (int64_t first = active.begin; first < active.end; first += kMaxTile) {
    const int64_t count = std::min<int64_t>(kMaxTile, active.end - first);
    const uint8_t* packed[kMaxTile];
    for (int64_t i = 0; i < count; ++i)
      packed[i] = packed_[groups_.pairs[static_cast<size_t>(first + i)].token];
    kernels_.project(expert[MatrixName::kGate], row_begin, row_end, packed, count, gate, num_rows);
    kernels_.project(expert[MatrixName::kUp], row_begin, row_end, packed, count, up, num_rows);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t r = 0; r < num_rows; ++r) {
        rounded[r] = Bf16FromFloat(Silu(gate[i * num_rows + r]) * up[i * num_rows + r]);
      }
      kernels_.pack(rounded, row_begin, num_rows, padded_end, inner_ + (first + i) * inner_stride_);
    }
  }
}

void Call::Down() {
  const StoreShape& shape = store_.shape();
  const int64_t row_bytes = store_.codec().WeightBytes(1, shape.ffn);
  const RowTasks rows = CutRows(shape.hidden, row_bytes, 1, session_.num_threads());
  session_.Run(rows.count(), [&](int64_t task) noexcept {
    for (int64_t t = 0; t < tokens_; ++t) {
      std::fill(out_ + t * shape.hidden + rows.begin(task), out_ + t * shape.hidden + rows.end(task), 0.0f);
    }
    for (const ActiveExpert& active : groups_.experts) DownRows(active, rows.begin(task), rows.end(task));
  });
}

void Call::DownRows(const ActiveExpert& active, int64_t row_begin, int64_t row_end) {
  const Matrix& down = store_.Expert(layer_, active.expert)[MatrixName::kDown];
  const int64_t num_rows = row_end - row_begin;
  float projected[kMaxTile * kMaxTaskRows];
  for (int64_t first = active.begin; first < active.end; first += kMaxTile) {
    const int64_t count = std::min<int64_t>(kMaxTile, active.end - first);
    const uint8_t* packed[kMaxTile];
    for (int64_t i = 0; i < count; ++i) packed[i] = inner_ + (first + i) * inner_stride_;
    kernels_.project(down, row_begin, row_end, packed, count, projected, num_rows);
    for (int64_t i = 0; i < count; ++i) {
      const Pair& pair = groups_.pairs[static_cast<size_t>(first + i)];
      float* out = out_ + pair.token * store_.shape().hidden + row_begin;
      for (int64_t r = 0; r < num_rows; ++r) out[r] += pair.weight * projected[i * num_rows + r];
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
  return {};
}

}  // namespace hmoe
