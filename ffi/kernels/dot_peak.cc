#include "kernels/dot_peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>

namespace hmoe {
namespace {

// A task of 1000 rounds is 5 to 25 us, so that the threads finish together; a pass of 200 of them per thread
// outlasts what a processor needs to settle on a clock for wide vectors.
constexpr int64_t kRounds = 1000;
constexpr int64_t kTasksPerThread = 200;
constexpr int kPasses = 8;

}  // namespace

double DotPeak(Compute& compute) {
  ThreadPool::Session session(*compute.pool);
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    std::atomic<int64_t> done{0};
    const auto start = std::chrono::steady_clock::now();
    session.Run(kTasksPerThread * session.num_threads(), [&](int64_t) noexcept {
      float sink;
      done += compute.isa.kernels->multiply_adds(kRounds, &sink);
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(done) / elapsed.count());
  }
  return best;
}

}  // namespace hmoe
