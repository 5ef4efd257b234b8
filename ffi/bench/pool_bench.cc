// What the thread pool costs by itself: calls with nothing to do, and calls while the cores are not all ours.
//
//   pool_bench [num_threads] [topology]     e.g. pool_bench 2 auto
//
// Prints a table for people and one line of JSON for machines.

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <functional>
#include <iomanip>
#include <iostream>
#include <thread>
#include <utility>
#include <vector>

#include "machine/pool.h"

namespace hmoe {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

double Microseconds(Clock::duration time) { return std::chrono::duration<double, std::micro>(time).count(); }

double MedianMicroseconds(int repeats, const std::function<void()>& before,
                          const std::function<void()>& call) {
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    before();
    const auto start = Clock::now();
    call();
    times.push_back(Microseconds(Clock::now() - start));
  }
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[static_cast<size_t>(repeats / 2)];
}

void BeBusyFor(Clock::duration time) {
  for (const auto end = Clock::now() + time; Clock::now() < end;) {
  }
}

// Some microseconds of arithmetic that no compiler removes.
void Compute() {
  uint64_t x = 88172645463325252u;
  for (int i = 0; i < 10000; ++i) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    asm volatile("" : "+r"(x));
  }
}

// Two barriers, as in a call of moe_experts.
void EmptyCall(ThreadPool& pool) {
  ThreadPool::Session session(pool);
  session.RunByNode(4 * pool.num_threads(), [](int, int64_t) noexcept {});
  session.RunByNode(4 * pool.num_threads(), [](int, int64_t) noexcept {});
}

void FullCall(ThreadPool& pool) {
  ThreadPool::Session session(pool);
  session.Run(32 * pool.num_threads(), [](int64_t) noexcept { Compute(); });
  session.Run(32 * pool.num_threads(), [](int64_t) noexcept { Compute(); });
}

void MoveTo(int cpu) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  sched_setaffinity(0, sizeof one, &one);
}

// Stands on another CPU from one call to the next, and may be moved from there.
class Wanderer {
 public:
  Wanderer() { sched_getaffinity(0, sizeof all_, &all_); }
  void Step() {
    MoveTo(cpus_[step_++ % cpus_.size()]);
    sched_setaffinity(0, sizeof all_, &all_);
  }

 private:
  const std::vector<int> cpus_ = AllowedCpus();
  cpu_set_t all_;
  size_t step_ = 0;
};

// Other processes that compute without pause, one on each allowed CPU.
class Hogs {
 public:
  explicit Hogs(size_t count) {
    const std::vector<int> cpus = AllowedCpus();
    for (size_t i = 0; i < count; ++i) {
      const pid_t child = fork();
      if (child == 0) {
        MoveTo(cpus[i % cpus.size()]);
        while (true) Compute();
      }
      children_.push_back(child);
    }
  }
  ~Hogs() {
    for (const pid_t child : children_) {
      kill(child, SIGKILL);
      waitpid(child, nullptr, 0);
    }
  }

 private:
  std::vector<pid_t> children_;
};

double MeanMicroseconds(int repeats, const std::function<void()>& call) {
  call();
  const auto start = Clock::now();
  for (int i = 0; i < repeats; ++i) call();
  return Microseconds(Clock::now() - start) / repeats;
}

using Rows = std::vector<std::pair<const char*, double>>;

Rows Measure(ThreadPool& pool) {
  const auto nothing = [] {};
  const auto empty = [&] { EmptyCall(pool); };
  const auto full = [&] { FullCall(pool); };
  Rows rows;
  rows.emplace_back("empty call", MedianMicroseconds(20000, nothing, empty));
  rows.emplace_back("empty call, the caller busy for 20 us before",
                    MedianMicroseconds(2000, [] { BeBusyFor(microseconds(20)); }, empty));
  rows.emplace_back("empty call, the caller busy for 2 ms before",
                    MedianMicroseconds(300, [] { BeBusyFor(microseconds(2000)); }, empty));
  rows.emplace_back("empty call, all asleep for 20 ms before",
                    MedianMicroseconds(50, [] { std::this_thread::sleep_for(microseconds(20000)); }, empty));
  const double alone = MedianMicroseconds(100, nothing, [&] {
    for (int i = 0; i < 64; ++i) Compute();
  });
  rows.emplace_back("full call, the same work per thread without the pool", alone);
  rows.emplace_back("full call", MeanMicroseconds(300, full));
  rows.emplace_back("full call, the caller busy for 2 ms before",
                    MedianMicroseconds(300, [] { BeBusyFor(microseconds(2000)); }, full));
  Wanderer wanderer;
  rows.emplace_back("full call, the caller on another CPU than before",
                    MedianMicroseconds(200, [&] { wanderer.Step(); }, full));
  rows.emplace_back("full call, the same after 2 ms", MedianMicroseconds(
                                                          200,
                                                          [&] {
                                                            wanderer.Step();
                                                            BeBusyFor(microseconds(2000));
                                                          },
                                                          full));
  {
    const Hogs one(1);
    rows.emplace_back("full call, another process on one CPU (mean)", MeanMicroseconds(2000, full));
  }
  const Hogs everywhere(AllowedCpus().size());
  rows.emplace_back("full call, another process on every CPU (mean)", MeanMicroseconds(1500, full));
  return rows;
}

int Main(int argc, char** argv) {
  const auto topology = FindTopology(argc > 2 ? argv[2] : "auto");
  if (!topology.ok()) return std::cerr << topology.error().message << '\n', 1;
  const auto asked = argc > 1 ? std::optional(std::atoi(argv[1])) : std::nullopt;
  const auto num_threads = ResolveNumThreads(topology.value(), asked);
  if (!num_threads.ok()) return std::cerr << num_threads.error().message << '\n', 1;
  const auto pool = ThreadPool::Create(num_threads.value(), topology.value());
  if (!pool.ok()) return std::cerr << pool.error().message << '\n', 1;

  std::cout << num_threads.value() << " threads on " << TopologyText(topology.value()) << ", microseconds\n";
  const Rows rows = Measure(*pool.value());
  std::cout << std::fixed << std::setprecision(2);
  for (const auto& [name, us] : rows) std::cout << std::setw(10) << us << "  " << name << '\n';
  std::cout << "{\"num_threads\": " << num_threads.value();
  for (const auto& [name, us] : rows) std::cout << ", \"" << name << "\": " << us;
  std::cout << "}\n";
  return 0;
}

}  // namespace
}  // namespace hmoe

int main(int argc, char** argv) { return hmoe::Main(argc, argv); }
