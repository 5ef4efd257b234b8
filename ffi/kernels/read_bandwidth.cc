#include "kernels/read_bandwidth.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>

namespace hmoe {
namespace {

constexpr int64_t kChunk = int64_t{1} << 20;
constexpr int kPasses = 5;  // of each kind

// On a two-core Emerald Rapids machine distances of 2 to 16 KB read alike, prefetches to the second-level
// cache faster than those to the first (by 5 to 20 %), and steps of 1 KB a little faster than of 256 bytes.
constexpr int64_t kAhead = 4096;
constexpr int64_t kStep = 1024;

class Pages {
 public:
  explicit Pages(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ != MAP_FAILED) madvise(memory_, bytes_, MADV_HUGEPAGE);  // a hint
  }
  ~Pages() {
    if (memory_ != MAP_FAILED) munmap(memory_, bytes_);
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  uint8_t* data() const { return memory_ == MAP_FAILED ? nullptr : static_cast<uint8_t*>(memory_); }

 private:
  size_t bytes_;
  void* memory_;
};

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
  const Pages pages(megabytes * kChunk);
  if (pages.data() == nullptr) return Fail("read_bandwidth: ", megabytes, " MB of memory are not to be had");

  ThreadPool::Session session(*compute.pool);
  session.Run(megabytes, [&](int64_t i) noexcept { std::memset(pages.data() + i * kChunk, 1, kChunk); });
  const Result<const Isa*> widest = SelectIsa("auto");
  if (!widest.ok()) return widest.error();
  const Read read = widest.value()->kernels->read;
  std::atomic<uint64_t> seen{0};
  double best_s = std::numeric_limits<double>::infinity();
  for (int pass = 0; pass < 2 * kPasses; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    session.Run(megabytes, [&](int64_t i) noexcept {
      const uint8_t* chunk = pages.data() + i * kChunk;
      seen ^= pass % 2 == 0 ? read(chunk, kChunk) : ReadAhead(read, chunk, kChunk);
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best_s = std::min(best_s, elapsed.count());
  }
  return static_cast<double>(megabytes * kChunk) / best_s / 1e9;
}

}  // namespace hmoe
