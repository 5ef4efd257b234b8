#include "kernels/read_bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "machine/memory.h"

namespace hmoe {
namespace {

constexpr int64_t kChunk = int64_t{1} << 20;
constexpr int kPasses = 5;

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
  std::atomic<uint64_t> seen{0};
  double best_s = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    session.RunByNode(chunks_per_node, [&](int node, int64_t i) noexcept {
      seen ^= compute.isa.kernels->read(chunk(node, i), kChunk);
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best_s = pass == 0 ? elapsed.count() : std::min(best_s, elapsed.count());
  }
  return static_cast<double>(bytes) / best_s / 1e9;
}

}  // namespace hmoe
