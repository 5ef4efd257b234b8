#include "machine/pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <chrono>
#include <system_error>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace hmoe {
namespace {

using Clock = std::chrono::steady_clock;

// Bridges the barriers inside a call and short gaps between calls; short enough that an idle engine costs
// nothing.
constexpr auto kSpin = std::chrono::microseconds(50);

inline void Pause() {
#if defined(__SSE__)
  _mm_pause();
#endif
}

// Waits until `value` is no longer `old`: awake first, then asleep.
void WaitForChange(const std::atomic<int32_t>& value, int32_t old) {
  const auto deadline = Clock::now() + kSpin;
  while (Clock::now() < deadline) {
    for (int i = 0; i < 32; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      Pause();
    }
  }
  value.wait(old, std::memory_order_acquire);
}

std::vector<int> AllowedCpus() {
  cpu_set_t set;
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

// Best effort: without it the pool is slower, not wrong.
void PinThisThread(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

// The default floating-point environment. XLA's threads flush denormals and new threads inherit that: without
// this the bits of a result would depend on which thread computed it.
class DefaultFloatEnvironment {
 public:
#if defined(__SSE__)
  DefaultFloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  DefaultFloatEnvironment() {}
#endif
};

}  // namespace

Result<std::unique_ptr<ThreadPool>> ThreadPool::Create(int num_threads) {
  if (num_threads < 1) return Fail("num_threads: expected at least 1, got ", num_threads);
  std::unique_ptr<ThreadPool> pool(new ThreadPool(num_threads));
  try {
    pool->StartWorkers();
  } catch (const std::system_error& refusal) {
    return Fail("num_threads: ", num_threads, " need ", num_threads - 1, " threads beside the caller, ",
                pool->workers_->size(), " started: ", refusal.code().message());
  }
  return pool;
}

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads), owner_(getpid()), workers_(std::make_unique<std::vector<std::thread>>()) {}

void ThreadPool::StartWorkers() {
  // The caller is someone else's thread and is not pinned; the first allowed CPU is left to it.
  const std::vector<int> cpus = AllowedCpus();
  for (int worker = 1; worker < num_threads_; ++worker) {
    const int cpu = cpus.empty() ? -1 : cpus[static_cast<size_t>(worker) % cpus.size()];
    workers_->emplace_back([this, cpu] { Work(cpu); });
  }
}

ThreadPool::~ThreadPool() {
  if (IsForked()) {
    // Their handles name threads of another process: neither to be joined nor to be destroyed.
    (void)workers_.release();
    return;
  }
  stopping_.store(true, std::memory_order_release);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : *workers_) worker.join();
}

bool ThreadPool::IsForked() const { return getpid() != owner_; }

void ThreadPool::RunTasks(Job job, int64_t num_tasks) {
  const DefaultFloatEnvironment environment;
  if (num_tasks <= 1 || num_threads_ == 1 || IsForked()) {
    for (int64_t task = 0; task < num_tasks; ++task) job.call(job.context, task);
    return;
  }
  job_ = job;
  num_tasks_ = num_tasks;
  unfinished_.store(static_cast<int32_t>(num_tasks), std::memory_order_relaxed);
  unclaimed_.store(num_tasks, std::memory_order_release);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();

  while (RunOneTask()) {
  }
  for (int32_t left; (left = unfinished_.load(std::memory_order_acquire)) != 0;)
    WaitForChange(unfinished_, left);
}

bool ThreadPool::RunOneTask() {
  int64_t unclaimed = unclaimed_.load(std::memory_order_relaxed);
  do {
    if (unclaimed == 0) return false;
  } while (!unclaimed_.compare_exchange_weak(unclaimed, unclaimed - 1, std::memory_order_acquire,
                                             std::memory_order_relaxed));
  job_.call(job_.context, num_tasks_ - unclaimed);
  if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
  return true;
}

void ThreadPool::Work(int cpu) {
  if (cpu >= 0) PinThisThread(cpu);
  const DefaultFloatEnvironment environment;
  while (true) {
    const int32_t seen = generation_.load(std::memory_order_acquire);
    if (stopping_.load(std::memory_order_acquire)) return;
    while (RunOneTask()) {
    }
    WaitForChange(generation_, seen);
  }
}

ThreadPool::Session::Session(ThreadPool& pool) : pool_(pool) {
  // In a forked process the lock may be held by a thread that does not exist there.
  if (!pool_.IsForked()) lock_ = std::unique_lock(pool_.session_);
  pool_.scratch_.Reset();
}

}  // namespace hmoe
