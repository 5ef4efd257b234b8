// Memory of the store's own, split over the NUMA nodes, into which matrices are copied.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "machine/memory.h"
#include "machine/pool.h"

namespace hmoe {

// Not to be used by two threads at once. Copies keep their addresses until the arena is destroyed.
class Arena {
 public:
  // Takes address space for `expected_bytes` of matrices at once, so that what can never fit is refused
  // before anything is copied. Pages are taken from the system when they are copied into.
  static Result<Arena> Create(ThreadPool& pool, int64_t expected_bytes);

  // Copies a row-major matrix, on all threads. It is contiguous and aligned to a cache line, and its rows
  // [n * R / N, (n + 1) * R / N) lie on node n of the pool's N (PartBegin states the rounding).
  Result<const uint8_t*> Copy(std::span<const uint8_t> matrix);

  // Why the kernel did not let the memory be bound to its nodes; empty when it did. Then a page lies where
  // the thread ran that copied into it first, which is mostly the same node.
  const std::optional<std::string>& refusal() const { return refusal_; }

 private:
  explicit Arena(ThreadPool& pool) : pool_(&pool) {}
  Status Grow(int64_t bytes);
  void Bind(std::span<uint8_t> copy);
  void CopyOnEveryNode(std::span<const uint8_t> matrix, uint8_t* copy);

  ThreadPool* pool_;
  std::vector<Pages> pages_;  // one, unless there is more than was expected
  int64_t used_ = 0;          // of the last
  std::optional<std::string> refusal_;
};

}  // namespace hmoe
