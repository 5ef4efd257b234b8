#include "machine/pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "tests/check.h"

namespace hmoe {
namespace {

void CheckEveryTaskRunsOnce(ThreadPool& pool, int64_t num_tasks) {
  std::vector<int> runs(static_cast<size_t>(num_tasks));
  ThreadPool::Session session(pool);
  session.Run(num_tasks, [&](int64_t task) noexcept { ++runs[static_cast<size_t>(task)]; });
  for (const int count : runs) CHECK_EQ(count, 1);
}

void TestEveryTaskRunsOnce() {
  for (const int threads : {1, 2, 3, 7}) {
    const auto pool = ThreadPool::Create(threads).value();
    for (int64_t i = 0; i < 3000; ++i) CheckEveryTaskRunsOnce(*pool, i % 13);
    CheckEveryTaskRunsOnce(*pool, 100000);
  }
}

void TestARunSeesWhatTheLastOneWrote() {
  const auto pool = ThreadPool::Create(3).value();
  std::vector<int64_t> values(64, 0);
  ThreadPool::Session session(*pool);
  for (int64_t round = 0; round < 2000; ++round) {
    session.Run(64, [&](int64_t task) noexcept {
      const int64_t neighbour = values[static_cast<size_t>(task)];
      if (neighbour != round) ++test::failures;
      values[static_cast<size_t>(task)] = neighbour + 1;
    });
  }
  CHECK_EQ(values.front(), 2000);
}

void TestCallersTakeTurns() {
  const auto pool = ThreadPool::Create(2).value();
  int64_t total = 0;  // not atomic: only one session is open at a time
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int round = 0; round < 500; ++round) {
        ThreadPool::Session session(*pool);
        std::atomic<int64_t> sum = 0;
        session.Run(5, [&](int64_t task) noexcept { sum += task; });
        total += sum;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK_EQ(total, 4 * 500 * 10);
}

void TestPoolsEndWhileTheirThreadsSpinOrSleep() {
  for (int i = 0; i < 200; ++i) {
    const auto pool = ThreadPool::Create(4).value();
    if (i % 2) CheckEveryTaskRunsOnce(*pool, 8);
    if (i % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void TestAForkedProcessComputesAloneAndEnds() {
  auto pool = ThreadPool::Create(3).value();
  CheckEveryTaskRunsOnce(*pool, 10);
  const pid_t child = fork();
  if (child == 0) {
    CheckEveryTaskRunsOnce(*pool, 10);
    pool.reset();
    _exit(test::failures);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK_EQ(status, 0);
}

void TestAPoolHasAtLeastTheCaller() {
  CHECK_EQ(ThreadPool::Create(0).error().message, "num_threads: expected at least 1, got 0");
}

}  // namespace
}  // namespace hmoe

int main() {
  hmoe::TestEveryTaskRunsOnce();
  hmoe::TestARunSeesWhatTheLastOneWrote();
  hmoe::TestCallersTakeTurns();
  hmoe::TestPoolsEndWhileTheirThreadsSpinOrSleep();
  hmoe::TestAForkedProcessComputesAloneAndEnds();
  hmoe::TestAPoolHasAtLeastTheCaller();
  return hmoe::test::failures;
}
