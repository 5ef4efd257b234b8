#include "kernels/linear.h"

#include <algorithm>

#include "codec/codec.h"
#include "kernels/tasks.h"

namespace hmoe {

const uint8_t** PackTokens(ThreadPool::Session& session, const CodecKernels& kernels,
                           const uint16_t* activations, int64_t num_tokens, int64_t cols) {
  const int64_t padded = CeilDiv(cols, kBlock) * kBlock;
  const int64_t stride = padded * kernels.packed_bytes;
  auto* packed = session.scratch().Take<uint8_t>(num_tokens * stride);
  auto** pointers = session.scratch().Take<const uint8_t*>(num_tokens);
  session.Run(num_tokens, [&](int64_t t) noexcept {
    kernels.pack(activations + t * cols, 0, cols, padded, packed + t * stride);
    pointers[t] = packed + t * stride;
  });
  return pointers;
}

void Linear(ThreadPool& pool, const CodecKernels& kernels, const Matrix& matrix, int64_t bytes_per_weight,
            const uint16_t* activations, int64_t num_tokens, float* out) {
  if (num_tokens == 0) return;
  ThreadPool::Session session(pool);
  const uint8_t** packed = PackTokens(session, kernels, activations, num_tokens, matrix.cols);
  const RowTasks tasks = CutRows(matrix.rows, matrix.cols * bytes_per_weight, 1, session.num_threads());
  session.Run(tasks.count(), [&](int64_t task) noexcept {
    for (int64_t t = 0; t < num_tokens; t += kMaxTile) {
      kernels.project(matrix, tasks.begin(task), tasks.end(task), packed + t,
                      std::min<int64_t>(kMaxTile, num_tokens - t), out + t * matrix.rows + tasks.begin(task),
                      matrix.rows);
    }
  });
}

}  // namespace hmoe
