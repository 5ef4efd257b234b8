#include "kernels/read_bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>

#include "machine/memory.h"

namespace hmoe {
namespace {

constexpr int64_t kChunk = int64_t{1} << 20;
constexpr int kPasses = 5;  // of each kind

// On a two-core Emerald Rapids machine distances of 2 to 16 KB read alike, prefetches to the second-level
// cache faster than those to the first (by 5 to 20 %), and steps of 1 KB a little faster than of 256 bytes.
constexpr int64_t kAhead = 4096;
constexpr int64_t kStep = 1024;

using Read = uint64_t (*)(const uint8_t* memory, int64_t bytes);

// May prefetch beyond the end, which is harmless.
uint64_t ReadAhead(Read read, const uint8_t* memory, int64_t bytes) {
  uint64_t seen = 0;
  for (int64_t i = 0; i < bytes; i += kStep) {
    for (int64_t line = 0; line < kStep; line += 64) __builtin_prefetch(memory + i + kAhead + line, 0, 2);
    seen ^= read(memory + i, kStep);
  }
  return seen;
}

}  // namespace

Result<double> ReadBandwidth(Compute& compute, int64_t megabytes) {
  if (megabytes <= 0) return Fail("megabytes: expected a positive number, got ", megabytes);
  ThreadPool::Session session(*compute.pool);
  const int64_t chunks_per_node = (megabytes + session.num_nodes() - 1) / session.num_nodes();
  const int64_t bytes = chunks_per_node * session.num_nodes() * kChunk;
  const auto pages = Pages::Allocate(bytes);
  if (!pages.ok()) return Fail("read_bandwidth: ", pages.error().message);
  // Each node reads what it wrote first, which is therefore its own memory.
  const auto chunk = [&](int node, int64_t i) {
    return pages.value().bytes().data() + (node * chunks_per_node + i) * kChunk;
  };
  session.RunByNode(chunks_per_node,
                    [&](int node, int64_t i) noexcept { std::memset(chunk(node, i), 1, kChunk); });
  const Result<const Isa*> widest = SelectIsa("auto");
  if (!widest.ok()) return widest.error();
  const Read read = widest.value()->kernels->read;
  std::atomic<uint64_t> seen{0};
  double best_s = std::numeric_limits<double>::infinity();
  for (int pass = 0; pass < 2 * kPasses; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    session.RunByNode(chunks_per_node, [&](int node, int64_t i) noexcept {
      seen ^= pass % 2 == 0 ? read(chunk(node, i), kChunk) : ReadAhead(read, chunk(node, i), kChunk);
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best_s = std::min(best_s, elapsed.count());
  }
  return static_cast<double>(bytes) / best_s / 1e9;
}

}  // namespace hmoe
