#include "kernels/linear.h"

#include <algorithm>

#include "kernels/packed.h"
#include "kernels/tasks.h"

namespace hmoe {

void Linear(ThreadPool& pool, const Isa& isa, const Codec& codec, const Matrix& matrix,
            const uint16_t* activations, int64_t num_tokens, float* out) {
  if (num_tokens == 0) return;
  ThreadPool::Session session(pool);
  const CodecKernels& kernels = isa.For(codec.id);
  const int64_t portion = PortionTokens(kernels, num_tokens), num_portions = CeilDiv(num_tokens, portion);
  auto* portions = session.scratch().Take<PackedTokens>(num_portions);
  for (int64_t p = 0; p < num_portions; ++p) {
    const int64_t count = std::min(portion, num_tokens - p * portion);
    portions[p] = TakePacked(session.scratch(), kernels, count, matrix.cols);
  }
  const auto row = [&](int64_t p, int64_t t) { return activations + (p * portion + t) * matrix.cols; };
  PackAll(session, kernels, num_portions, matrix.cols, [&](int64_t p) { return portions[p]; }, row);

  const RowTasks tasks = CutRows({matrix.rows, codec.WeightBytes(1, matrix.cols), num_tokens, 1}, session);
  session.RunByNode(tasks.per_node(), [&](int node, int64_t task, TaskThread& thread) noexcept {
    const int64_t begin = tasks.begin(node, task), end = tasks.end(node, task);
    if (begin >= end) return;
    auto* workspace = thread.Memory<uint8_t>(kWorkspaceBytes);
    for (int64_t p = 0; p < num_portions; ++p) {
      kernels.project(matrix, begin, end, portions[p], out + p * portion * matrix.rows + begin, matrix.rows,
                      nullptr, workspace);
    }
  });
}

}  // namespace hmoe
