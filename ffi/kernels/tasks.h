// How rows of a matrix are cut into tasks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "codec/codec.h"

namespace hmoe {

// Packing moves 8 columns together, and the rows of one projection are the columns of the next.
inline constexpr int64_t kRowGroup = 8;
inline constexpr int64_t kMaxTaskRows = 64;

struct RowTasks {
  int64_t rows;           // of the matrix
  int64_t rows_per_task;  // the last task may have fewer
  int64_t count() const { return CeilDiv(rows, rows_per_task); }
  int64_t begin(int64_t task) const { return task * rows_per_task; }
  int64_t end(int64_t task) const { return std::min(rows, begin(task) + rows_per_task); }
};

// About 128 KB of weights per task: some 10 us of one core's memory bandwidth, far more than one atomic
// operation to claim it, and small enough to stay in L2 while several tiles of tokens pass over it. Fewer
// where the threads would run out of tasks: with eight each, the last one finishes within an eighth of the
// others.
inline RowTasks CutRows(int64_t rows, int64_t row_bytes, int64_t tasks_per_row_range, int64_t num_threads) {
  constexpr int64_t kTaskBytes = 128 * 1024;
  const int64_t by_bytes = kTaskBytes / row_bytes;
  const int64_t by_threads = rows * tasks_per_row_range / (8 * num_threads);
  const int64_t wanted = std::clamp(std::min(by_bytes, by_threads), kRowGroup, kMaxTaskRows);
  return {rows, wanted / kRowGroup * kRowGroup};
}

}  // namespace hmoe
