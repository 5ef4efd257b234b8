#include "machine/pool.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <sstream>
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

void CheckEveryNodesTasksRunOnce(ThreadPool& pool, int64_t tasks_per_node) {
  const auto num_nodes = static_cast<size_t>(pool.num_nodes());
  std::vector<std::vector<int>> runs(num_nodes, std::vector<int>(static_cast<size_t>(tasks_per_node)));
  ThreadPool::Session session(pool);
  session.RunByNode(tasks_per_node, [&](int node, int64_t task) noexcept {
    ++runs[static_cast<size_t>(node)][static_cast<size_t>(task)];
  });
  for (const auto& of_node : runs) {
    for (const int count : of_node) CHECK_EQ(count, 1);
  }
}

void TestEveryNodeHasItsTasks() {
  for (const char* nodes : {"0", "0;1", "0-1;0-1", "0;1;0;1", "0;1,1,1,1;1"}) {
    const Topology topology = FindTopology(nodes).value();
    for (int threads = 1; threads <= topology.num_cpus(); ++threads) {
      const auto pool = ThreadPool::Create(threads, topology).value();
      CHECK_EQ(pool->num_nodes(), std::min<int>(threads, static_cast<int>(topology.nodes.size())));
      for (int64_t tasks = 0; tasks < 200; ++tasks) CheckEveryNodesTasksRunOnce(*pool, tasks % 11);
    }
  }
}

// Whoever runs the first task is kept in it until all others are done, those of its own node too.
void TestANodeWhoseThreadIsKeptIsHelped() {
  const auto pool = ThreadPool::Create(2, FindTopology("0;1").value()).value();
  ThreadPool::Session session(*pool);
  std::atomic<int> started = 0, done = 0;
  session.RunByNode(5, [&](int, int64_t) noexcept {
    if (started.fetch_add(1) == 0) {
      while (done.load() < 9) std::this_thread::yield();
    }
    done.fetch_add(1);
  });
  CHECK_EQ(done.load(), 10);
}

void TestAThreadsMemoryIsItsOwnAndStays() {
  const auto pool = ThreadPool::Create(3, FindTopology("0-1;0").value()).value();
  std::vector<int*> memory(3, nullptr);
  for (int round = 0; round < 300; ++round) {
    ThreadPool::Session session(*pool);
    session.Run(50, [&](int64_t task, TaskThread& thread) noexcept {
      int* mine = thread.Memory<int>(1000);
      CHECK_EQ(reinterpret_cast<uintptr_t>(mine) % 64, 0u);
      int*& before = memory[static_cast<size_t>(thread.index())];
      if (before != nullptr && before != mine) ++test::failures;
      before = mine;
      std::fill(mine, mine + 1000, static_cast<int>(task));
      std::this_thread::yield();
      if (std::count(mine, mine + 1000, static_cast<int>(task)) != 1000) ++test::failures;
    });
  }
  ThreadPool::Session session(*pool);
  session.RunByNode(50, [&](int node, int64_t, TaskThread& thread) noexcept {
    int* mine = thread.Memory<int>(100000);
    std::fill(mine, mine + 100000, node);
  });
}

void TestHundredsOfThreadsOnFewCpus() {
  std::ostringstream nodes;
  for (int i = 0; i < 300; ++i)
    nodes << (i == 0 ? "" : i % 75 == 0 ? ";" : ",") << i % 4;  // 2 and 3 may not exist
  const Topology topology = FindTopology(nodes.str()).value();
  const auto pool = ThreadPool::Create(300, topology).value();
  CHECK_EQ(pool->num_nodes(), 4);
  for (int round = 0; round < 20; ++round) {
    CheckEveryTaskRunsOnce(*pool, 1000);
    CheckEveryNodesTasksRunOnce(*pool, 100);
    if (round % 5 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

// Every thread gets a task although all sleep: the wake-up is handed on.
void TestAllSleepersWake() {
  constexpr int kThreads = 60;
  const auto pool = ThreadPool::Create(kThreads).value();
  for (int round = 0; round < 3; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    std::atomic<int> waiting = kThreads;
    ThreadPool::Session session(*pool);
    session.Run(kThreads, [&](int64_t) noexcept {
      waiting.fetch_sub(1);
      while (waiting.load() > 0) std::this_thread::yield();
    });
    CHECK_EQ(waiting.load(), 0);
  }
}

void TestTheCallerMayComeFromAnyCpu() {
  const std::vector<int> allowed = AllowedCpus();
  cpu_set_t all;
  sched_getaffinity(0, sizeof all, &all);
  const auto pool = ThreadPool::Create(static_cast<int>(std::min<size_t>(allowed.size(), 4))).value();
  for (int round = 0; round < 500; ++round) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(allowed[static_cast<size_t>(round) % allowed.size()], &one);
    sched_setaffinity(0, sizeof one, &one);
    CheckEveryTaskRunsOnce(*pool, 10);
  }
  sched_setaffinity(0, sizeof all, &all);
}

double CpuSeconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

void TestAnIdlePoolCostsNothing() {
  const auto pool = ThreadPool::Create(8).value();
  CheckEveryTaskRunsOnce(*pool, 100);
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const double before = CpuSeconds();
  std::this_thread::sleep_for(std::chrono::seconds(1));
  CHECK(CpuSeconds() - before < 0.01);
}

void TestPoolsComputeSideBySide() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([i] {
      const auto pool = ThreadPool::Create(2 + i).value();
      for (int64_t round = 0; round < 300; ++round) CheckEveryTaskRunsOnce(*pool, round % 17);
    });
  }
  for (std::thread& caller : callers) caller.join();
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
  hmoe::TestEveryNodeHasItsTasks();
  hmoe::TestANodeWhoseThreadIsKeptIsHelped();
  hmoe::TestAThreadsMemoryIsItsOwnAndStays();
  hmoe::TestHundredsOfThreadsOnFewCpus();
  hmoe::TestAllSleepersWake();
  hmoe::TestTheCallerMayComeFromAnyCpu();
  hmoe::TestAnIdlePoolCostsNothing();
  hmoe::TestPoolsComputeSideBySide();
  return hmoe::test::failures;
}
