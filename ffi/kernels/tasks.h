// How rows of a matrix are cut into tasks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "codec/codec.h"
#include "kernels/table.h"
#include "machine/cpu.h"
#include "machine/pool.h"

namespace hmoe {

// Rows in whole tiles of 16, first cut into as many equal parts as there are NUMA nodes (as their memory is),
// then into tasks. The last ones may be short, or empty.
struct RowTasks {
  int64_t rows;  // of the matrix
  int64_t rows_per_node;
  int64_t rows_per_task;

  int64_t per_node() const { return CeilDiv(rows_per_node, rows_per_task); }
  int64_t begin(int node, int64_t task) const {
    return std::min(rows, node * rows_per_node + task * rows_per_task);
  }
  int64_t end(int node, int64_t task) const {
    return std::min({rows, (node + 1) * rows_per_node, begin(node, task) + rows_per_task});
  }
};

// What a cut has to know: the bytes of a row, how many tokens use it, and how many matrices are cut alike.
struct Work {
  int64_t rows;
  int64_t row_bytes;
  int64_t tokens;
  int64_t matrices;
};

// A task reads a quarter of the second cache from each of its matrices: some 30 us of one core's memory
// bandwidth, so that neither claiming it counts nor its first lines, which nobody asked for in time. With
// more tokens than a tile has, as many rows as a kernel takes: they share the packed activations that pass
// through the cache. Fewer where the threads would run out of tasks: with eight each, the last one finishes
// within an eighth of the others.
inline RowTasks CutRows(const Work& work, const ThreadPool::Session& session) {
  constexpr int64_t kTileRows = 16, kTileTokens = 16;
  const bool has_many_tokens = work.tokens > kTileTokens;
  const int64_t unit = has_many_tokens ? 2 * kTileRows : kTileRows;  // that tiles multiply at a time
  static const int64_t run_bytes = SecondCacheBytes() / 4;
  const int64_t by_use = has_many_tokens ? kMaxRows : run_bytes / work.row_bytes;
  const int64_t by_threads = work.rows * work.matrices / (8 * session.num_threads());
  const int64_t wanted = std::clamp(std::min(by_use, by_threads), unit, kMaxRows);
  return {work.rows, RoundUp(CeilDiv(work.rows, session.num_nodes()), kTileRows), wanted / unit * unit};
}

}  // namespace hmoe
