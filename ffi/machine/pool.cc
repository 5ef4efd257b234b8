#include "machine/pool.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <limits>
#include <system_error>

#include "machine/wait.h"

namespace hmoe {
namespace {

// Each thread that is woken wakes as many more: 255 threads are awake after three steps of a few microseconds
// each, where one thread that wakes them all would not begin its own work for a quarter of a millisecond.
constexpr int kWakeAtOnce = 7;

bool IsOpen(int32_t generation) { return generation % 2 != 0; }

std::vector<int> MemoryNodes(const std::vector<ThreadPlace>& places) {
  std::vector<int> memory_nodes;
  for (const ThreadPlace& place : places) {
    if (place.node == static_cast<int>(memory_nodes.size())) memory_nodes.push_back(place.memory_node);
  }
  return memory_nodes;
}

// A hardware thread on which no thread of the pool stands belongs to the place on its core.
std::vector<int> PlaceOfCpu(const std::vector<ThreadPlace>& places) {
  int max_cpu = 0;
  for (const ThreadPlace& place : places) {
    for (const int cpu : place.core) max_cpu = std::max(max_cpu, cpu);
  }
  std::vector<int> place_of(static_cast<size_t>(max_cpu) + 1, -1);
  const auto take = [&](int cpu, size_t place) {
    int& taken = place_of[static_cast<size_t>(cpu)];
    if (taken < 0) taken = static_cast<int>(place);
  };
  for (size_t p = 0; p < places.size(); ++p) take(places[p].cpu, p);
  for (size_t p = 0; p < places.size(); ++p) {
    for (const int cpu : places[p].core) take(cpu, p);
  }
  return place_of;
}

}  // namespace

// One cache line of its own, because the worker writes it at every Run.
struct alignas(64) ThreadPool::Worker {
  enum State : int32_t { kIdle, kBusy, kAwaited };  // awaited: busy, and the caller sleeps until it is idle

  explicit Worker(int index) : place(index), task_thread(index) {}

  std::atomic<int32_t> state{kIdle};
  int place;
  TaskThread task_thread;
  std::thread thread;
};

Result<std::unique_ptr<ThreadPool>> ThreadPool::Create(int num_threads, const Topology& topology) {
  if (num_threads < 1) return Fail("num_threads: expected at least 1, got ", num_threads);
  std::unique_ptr<ThreadPool> pool(new ThreadPool(num_threads, topology));
  try {
    pool->StartWorkers();
  } catch (const std::system_error& refusal) {
    return Fail("num_threads: ", num_threads, " need ", num_threads - 1, " threads beside the caller, ",
                pool->workers_->size() - 1, " started: ", refusal.code().message());
  }
  return pool;
}

ThreadPool::ThreadPool(int num_threads, const Topology& topology)
    : owner_(getpid()),
      places_(PlaceThreads(topology, num_threads)),
      memory_nodes_(MemoryNodes(places_)),
      place_of_cpu_(PlaceOfCpu(places_)),
      occupant_of_(places_.size(), nullptr),
      lists_(memory_nodes_.size()),
      workers_(std::make_unique<std::vector<std::unique_ptr<Worker>>>()) {}

void ThreadPool::StartWorkers() {
  for (int index = 1; index < num_threads(); ++index) {
    Worker& worker = *workers_->emplace_back(std::make_unique<Worker>(index));
    worker.thread = std::thread([this, &worker] { Work(worker); });
    Pin(worker.thread, places_[static_cast<size_t>(index)].cpu);
    occupant_of_[static_cast<size_t>(index)] = &worker;
  }
}

ThreadPool::~ThreadPool() {
  if (IsForked()) {
    // Their handles name threads of another process: neither to be joined nor to be destroyed.
    (void)workers_.release();
    return;
  }
  stopping_.store(true, std::memory_order_release);
  generation_.fetch_add(2, std::memory_order_seq_cst);
  WakeSleepers(generation_, std::numeric_limits<int>::max());
  for (const auto& worker : *workers_) {
    if (worker->thread.joinable()) worker->thread.join();
  }
}

bool ThreadPool::IsForked() const { return getpid() != owner_; }

void ThreadPool::RunAlone(const Job& job) {
  for (int list = 0; list < job.num_lists; ++list) {
    for (int64_t task = 0; task < job.tasks_per_list; ++task) job.call(job.context, list, task, caller_);
  }
}

void ThreadPool::Run(const Job& job) {
  if (num_threads() == 1 || job.num_lists * job.tasks_per_list <= 1) return RunAlone(job);
  GiveCallerItsPlace();
  Open(job);
  RunTasks(places_[static_cast<size_t>(caller_place_)].node, caller_);
  Close();
}

// The caller is someone else's thread: its affinity is left alone, and it may come from any CPU. Where it
// comes from a worker's, that worker is given the place that the caller left, before it is woken. Otherwise
// both would share a CPU while another stands idle, until the kernel notices after some milliseconds: with a
// caller that changes its CPU between calls, on two CPUs, a call of 1.3 ms took 1.4 to 2.0 ms, and with
// workers free to move within their node 1.6 to 2.6 ms.
void ThreadPool::GiveCallerItsPlace() {
  const int cpu = sched_getcpu();
  if (cpu < 0 || cpu >= static_cast<int>(place_of_cpu_.size())) return;
  const int place = place_of_cpu_[static_cast<size_t>(cpu)];
  const ThreadPlace& left = places_[static_cast<size_t>(caller_place_)];
  if (place < 0 || place == caller_place_ || left.cpu == cpu) return;
  Worker& displaced = *occupant_of_[static_cast<size_t>(place)];
  displaced.place = caller_place_;
  Pin(displaced.thread, left.cpu);
  occupant_of_[static_cast<size_t>(caller_place_)] = &displaced;
  occupant_of_[static_cast<size_t>(place)] = nullptr;
  caller_place_ = place;
}

void ThreadPool::Open(const Job& job) {
  job_ = job;
  for (TaskList& list : lists_) list.claimed.store(0, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) WakeSleepers(generation_, kWakeAtOnce);
}

void ThreadPool::Close() {
  generation_.fetch_add(1, std::memory_order_seq_cst);
  for (const auto& worker : *workers_) {
    std::atomic<int32_t>& state = worker->state;
    int32_t seen = state.load(std::memory_order_seq_cst);
    if (seen == Worker::kIdle || SpinWhile(state, seen)) continue;
    if (state.compare_exchange_strong(seen, Worker::kAwaited)) SleepWhile(state, Worker::kAwaited);
  }
}

void ThreadPool::RunTasks(int node, TaskThread& thread) {
  for (int i = 0; i < job_.num_lists; ++i) {
    const int list = (node + i) % job_.num_lists;
    std::atomic<int64_t>& claimed = lists_[static_cast<size_t>(list)].claimed;
    // Looking first spares the line's owner a visit from everybody who comes to help when nothing is left.
    while (claimed.load(std::memory_order_relaxed) < job_.tasks_per_list) {
      const int64_t task = claimed.fetch_add(1, std::memory_order_relaxed);
      if (task >= job_.tasks_per_list) break;
      job_.call(job_.context, list, task, thread);
    }
  }
}

void ThreadPool::Work(Worker& worker) {
  const DefaultFloatEnvironment environment;
  for (int32_t seen = 0; !stopping_.load(std::memory_order_acquire); seen = AwaitChange(seen)) {
    if (!IsOpen(seen)) continue;
    worker.state.store(Worker::kBusy, std::memory_order_seq_cst);
    if (generation_.load(std::memory_order_seq_cst) == seen) {
      RunTasks(places_[static_cast<size_t>(worker.place)].node, worker.task_thread);
    }
    if (worker.state.exchange(Worker::kIdle, std::memory_order_seq_cst) == Worker::kAwaited) {
      WakeSleepers(worker.state, 1);
    }
  }
}

int32_t ThreadPool::AwaitChange(int32_t seen) {
  if (!SpinWhile(generation_, seen)) {
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    SleepWhile(generation_, seen);
    const bool others_sleep = sleepers_.fetch_sub(1, std::memory_order_seq_cst) > 1;
    if (others_sleep && IsOpen(generation_.load(std::memory_order_relaxed))) {
      WakeSleepers(generation_, kWakeAtOnce);
    }
  }
  return generation_.load(std::memory_order_acquire);
}

ThreadPool::Session::Session(ThreadPool& pool) : pool_(pool), is_forked_(pool.IsForked()) {
  // In a forked process the lock may be held by a thread that does not exist there.
  if (!is_forked_) lock_ = std::unique_lock(pool_.session_);
  pool_.scratch_.Reset();
}

}  // namespace hmoe
