// Memory of the store's own, split over the NUMA nodes, into which matrices are copied.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "machine/gpu_driver.h"
#include "machine/memory.h"
#include "machine/pool.h"

namespace hmoe {

// Not to be used by two threads at once. Copies keep their addresses until the arena is destroyed.
class Arena {
 public:
  // Takes address space for `expected_bytes` of matrices at once, so that what can never fit is refused
  // before anything is copied. Pages are taken from the system when they are copied into.
  static Result<Arena> Create(ThreadPool& pool, int64_t expected_bytes);

  // What is copied next begins a page, so that everything from here to the next record can be pinned
  // together.
  void BeginRecord();

  // Copies a row-major matrix, on all threads. It is contiguous and aligned to a cache line, directly behind
  // the one before, and its rows [n * R / N, (n + 1) * R / N) lie on node n of the pool's N (PartBegin states
  // the rounding).
  Result<const uint8_t*> Copy(std::span<const uint8_t> matrix);

  // Pins the next whole records, at least one, after all was copied. Returns the bytes, 0 when nothing is
  // left. What fails unpins everything.
  Result<int64_t> PinNext(const std::shared_ptr<const GpuDriver>& driver, int64_t most_bytes);

  // Why the kernel did not let the memory be bound to its nodes; empty when it did. Then a page lies where
  // the thread ran that copied into it first, which is mostly the same node.
  const std::optional<std::string>& refusal() const { return refusal_; }

 private:
  explicit Arena(ThreadPool& pool) : pool_(&pool) {}
  Status Grow(int64_t bytes);
  void Bind(std::span<uint8_t> copy);
  void CopyOnEveryNode(std::span<const uint8_t> matrix, uint8_t* copy);

  ThreadPool* pool_;
  std::vector<Pages> pages_;          // one, unless there is more than was expected
  int64_t used_ = 0;                  // of the last
  std::vector<int64_t> records_;      // where they begin in the last
  size_t next_record_ = 0;            // to be pinned
  std::vector<PinnedMemory> pinned_;  // of the only pages; goes before them
  std::optional<std::string> refusal_;
};

}  // namespace hmoe
