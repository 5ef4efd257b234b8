// How rows of a matrix are cut into tasks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "codec/codec.h"
#include "kernels/table.h"

namespace hmoe {

struct RowTasks {
  int64_t rows;           // of the matrix
  int64_t rows_per_task;  // the last task may have fewer
  int64_t count() const { return CeilDiv(rows, rows_per_task); }
  int64_t begin(int64_t task) const { return task * rows_per_task; }
  int64_t end(int64_t task) const { return std::min(rows, begin(task) + rows_per_task); }
};

// What a cut has to know: the bytes that one row of a task reads, how many tokens use them, how many such
// matrices are cut alike, and how many threads take the tasks.
struct Work {
  int64_t rows;
  int64_t row_bytes;
  int64_t tokens;
  int64_t matrices;
  int64_t num_threads;
};

// About 128 KB of weights per task: some 10 us of one core's memory bandwidth, far more than one atomic
// operation to claim it, and a fraction of the smallest L2 cache (1 MB), beside the activations. With many
// tokens as many rows as a kernel takes: they share the packed activations that pass through the cache. Fewer
// where the threads would run out of tasks: with eight each, the last one finishes within an eighth of the
// others. Whole tiles of 16 rows.
inline RowTasks CutRows(const Work& work) {
  constexpr int64_t kTaskBytes = 128 * 1024, kTileRows = 16, kManyTokens = 16;
  const int64_t by_use = work.tokens > kManyTokens ? kMaxRows : kTaskBytes / work.row_bytes;
  const int64_t by_threads = work.rows * work.matrices / (8 * work.num_threads);
  const int64_t wanted = std::clamp(std::min(by_use, by_threads), kTileRows, kMaxRows);
  return {work.rows, wanted / kTileRows * kTileRows};
}

}  // namespace hmoe
