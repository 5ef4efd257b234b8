#include "bench/naive_experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "codec/fp8_block.h"
#include "kernels/tasks.h"
#include "machine/cpu.h"

namespace hmoe {
namespace {

constexpr int64_t kFloatBytes = sizeof(float);

inline __attribute__((always_inline)) void DequantiseRow(const uint8_t* weights, const uint8_t* scales,
                                                         int64_t cols, float* row) {
  for (int64_t begin = 0; begin < cols; begin += kBlock) {
    const int64_t end = std::min(cols, begin + kBlock);
    float scale;  // at any address
    std::memcpy(&scale, scales + begin / kBlock * kFloatBytes, sizeof scale);
#pragma omp simd
    for (int64_t c = begin; c < end; ++c) row[c] = kE4M3Values.value[weights[c]] * scale;
  }
}

inline __attribute__((always_inline)) float Dot(const float* a, const float* b, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// One row of a matrix times the activations of every token of an expert: out[t] = row * activations[t].
struct RowOfTokens {
  const uint8_t* weights;
  const uint8_t* scales;
  int64_t cols;
  const float* const* activations;
  int64_t num_tokens;
  float* row;  // [cols]
  float* out;  // [num_tokens]
};

inline __attribute__((always_inline)) void Multiply(const RowOfTokens& row) {
  DequantiseRow(row.weights, row.scales, row.cols, row.row);
  for (int64_t t = 0; t < row.num_tokens; ++t) row.out[t] = Dot(row.row, row.activations[t], row.cols);
}

using MultiplyRow = void (*)(const RowOfTokens& row);

// The same source for three machines, as -march=native would make it for the one that it runs on.
void MultiplyAnywhere(const RowOfTokens& row) { Multiply(row); }
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void MultiplyAvx2(const RowOfTokens& row) { Multiply(row); }
__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"))) void MultiplyAvx512(
    const RowOfTokens& row) {
  Multiply(row);
}
#endif

MultiplyRow BestMultiply() {
#if defined(__x86_64__)
  const CpuFeatures cpu = DetectCpu();
  if (cpu.avx512) return MultiplyAvx512;
  if (cpu.avx2) return MultiplyAvx2;
#endif
  return MultiplyAnywhere;
}

class Call {
 public:
  Call(ExpertStore& store, int64_t layer, const Routing& routing, const float* hidden, float* out,
       ThreadPool::Session& session)
      : store_(store),
        layer_(layer),
        tokens_(routing.tokens),
        hidden_(hidden),
        out_(out),
        session_(session),
        multiply_(BestMultiply()),
        groups_(GroupByExpert(routing, store.shape().experts, session.scratch())),
        inner_(session.scratch().Take<float>(std::ssize(groups_.pairs) * store.shape().ffn)) {}

  void Run() {
    const StoreShape& shape = store_.shape();
    const int64_t num_active = std::ssize(groups_.experts);
    const RowTasks inner = CutRows({shape.ffn, 2 * shape.hidden, tokens_, num_active}, session_);
    session_.RunByNode(num_active * inner.per_node(), [&](int node, int64_t task) noexcept {
      const ActiveExpert& active = groups_.experts[static_cast<size_t>(task / inner.per_node())];
      GateAndUpRows(active, inner.begin(node, task % inner.per_node()),
                    inner.end(node, task % inner.per_node()));
    });
    const RowTasks outer = CutRows({shape.hidden, shape.ffn, tokens_, 1}, session_);
    session_.RunByNode(outer.per_node(), [&](int node, int64_t task) noexcept {
      DownRows(outer.begin(node, task), outer.end(node, task));
    });
  }

 private:
  void GateAndUpRows(const ActiveExpert& active, int64_t row_begin, int64_t row_end) {
    const ExpertWeights& expert = store_.Expert(layer_, active.expert);
    const int64_t ffn = store_.shape().ffn;
    const int64_t count = active.end - active.begin;
    std::vector<const float*> activations;
    for (int64_t i = active.begin; i < active.end; ++i)
      activations.push_back(hidden_ + PairAt(i).token * Hidden());
    std::vector<float> gate(static_cast<size_t>(count)), up(static_cast<size_t>(count)), row;
    for (int64_t r = row_begin; r < row_end; ++r) {
      MultiplyOne(expert[MatrixName::kGate], r, activations, row, gate);
      MultiplyOne(expert[MatrixName::kUp], r, activations, row, up);
      for (int64_t i = 0; i < count; ++i) {
        const float g = gate[static_cast<size_t>(i)];
        inner_[(active.begin + i) * ffn + r] = g / (1.0f + std::exp(-g)) * up[static_cast<size_t>(i)];
      }
    }
  }

  void DownRows(int64_t row_begin, int64_t row_end) {
    for (int64_t t = 0; t < tokens_; ++t) {
      std::fill(out_ + t * Hidden() + row_begin, out_ + t * Hidden() + row_end, 0.0f);
    }
    std::vector<float> row, projected;
    for (const ActiveExpert& active : groups_.experts) {
      std::vector<const float*> activations;
      for (int64_t i = active.begin; i < active.end; ++i)
        activations.push_back(inner_ + i * store_.shape().ffn);
      projected.resize(activations.size());
      for (int64_t r = row_begin; r < row_end; ++r) {
        MultiplyOne(store_.Expert(layer_, active.expert)[MatrixName::kDown], r, activations, row, projected);
        for (int64_t i = active.begin; i < active.end; ++i) {
          out_[PairAt(i).token * Hidden() + r] +=
              PairAt(i).weight * projected[static_cast<size_t>(i - active.begin)];
        }
      }
    }
  }

  void MultiplyOne(const Matrix& matrix, int64_t r, const std::vector<const float*>& activations,
                   std::vector<float>& row, std::vector<float>& out) const {
    row.resize(static_cast<size_t>(matrix.cols));
    const int64_t scales_per_row = CeilDiv(matrix.cols, kBlock);
    const uint8_t* scales = matrix.scales + r / matrix.rows_per_scale * scales_per_row * kFloatBytes;
    multiply_({matrix.weights + r * matrix.cols, scales, matrix.cols, activations.data(),
               std::ssize(activations), row.data(), out.data()});
  }

  const Pair& PairAt(int64_t i) const { return groups_.pairs[static_cast<size_t>(i)]; }
  int64_t Hidden() const { return store_.shape().hidden; }

  ExpertStore& store_;
  const int64_t layer_;
  const int64_t tokens_;
  const float* const hidden_;
  float* const out_;
  ThreadPool::Session& session_;
  const MultiplyRow multiply_;
  const Groups groups_;
  float* const inner_;  // silu(gate) * up, per pair
};

}  // namespace

Status NaiveExperts(ExpertStore& store, int64_t layer, const float* hidden, const Routing& routing,
                    float* out) {
  const auto reading = store.Read();
  if (!reading.ok()) return reading.error();
  if (store.codec().id != CodecId::kFp8Block)
    return Fail("naive_experts: expected codec fp8_block, got ", store.codec().name);
  if (layer < 0 || layer >= store.shape().layers) {
    return Fail("layer: expected 0 <= layer < ", store.shape().layers, ", got ", layer);
  }
  if (Status checked = CheckRouting(routing, store.shape().experts); !checked.ok()) return checked;
  ThreadPool::Session session(store.pool());
  Call(store, layer, routing, hidden, out, session).Run();
  return {};
}

}  // namespace hmoe
