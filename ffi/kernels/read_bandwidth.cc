#include "kernels/read_bandwidth.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

namespace hmoe {
namespace {

constexpr int64_t kChunk = int64_t{1} << 20;
constexpr int kPasses = 5;

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

}  // namespace

Result<double> ReadBandwidth(Compute& compute, int64_t megabytes) {
  if (megabytes <= 0) return Fail("megabytes: expected a positive number, got ", megabytes);
  const Pages pages(megabytes * kChunk);
  if (pages.data() == nullptr) return Fail("read_bandwidth: ", megabytes, " MB of memory are not to be had");

  ThreadPool::Session session(*compute.pool);
  session.Run(megabytes, [&](int64_t i) noexcept { std::memset(pages.data() + i * kChunk, 1, kChunk); });
  std::atomic<uint64_t> seen{0};
  double best_s = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    session.Run(megabytes, [&](int64_t i) noexcept {
      seen ^= compute.isa.kernels->read(pages.data() + i * kChunk, kChunk);
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best_s = pass == 0 ? elapsed.count() : std::min(best_s, elapsed.count());
  }
  return static_cast<double>(megabytes * kChunk) / best_s / 1e9;
}

}  // namespace hmoe
