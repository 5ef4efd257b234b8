// The threads that compute: pinned, one group per NUMA node, awake while there is work, asleep soon after.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "base/result.h"
#include "base/scratch.h"
#include "machine/float_environment.h"
#include "machine/places.h"
#include "machine/task_thread.h"
#include "machine/topology.h"

namespace hmoe {

// `num_threads` threads including the caller of Run. A call (one FFI call, several Runs) holds a Session;
// callers in other threads wait for their turn. In a process forked from the owner the other threads do not
// exist, and Run does all the work on the caller.
//
// XLA's intra-op pool is not used: blocking in it can deadlock.
class ThreadPool {
 public:
  // Fails when the system does not give the threads; those that it gave are ended first. A thread whose CPU
  // does not exist is not pinned.
  static Result<std::unique_ptr<ThreadPool>> Create(int num_threads,
                                                    const Topology& topology = DetectTopology());
  ~ThreadPool();  // no session may be open
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(places_.size()); }

  int first_cpu() const { return places_.front().cpu; }

  // How many NUMA nodes have a thread of the pool: the memory is split in as many parts.
  int num_nodes() const { return static_cast<int>(memory_nodes_.size()); }
  // The kernel's number of each of them, or kNoMemoryNode.
  const std::vector<int>& memory_nodes() const { return memory_nodes_; }

  class Session;

 private:
  // Tasks of every node are claimed by counting up. `num_lists` is 1 where any thread may claim any task.
  struct Job {
    void (*call)(void* context, int node, int64_t task, TaskThread& thread) = nullptr;
    void* context = nullptr;
    int num_lists = 0;
    int64_t tasks_per_list = 0;
  };
  struct alignas(64) TaskList {
    std::atomic<int64_t> claimed{0};
  };
  struct Worker;

  ThreadPool(int num_threads, const Topology& topology);
  void StartWorkers();
  void Run(const Job& job);
  void RunAlone(const Job& job);
  void RunTasks(int node, TaskThread& thread);
  void GiveCallerItsPlace();
  void Open(const Job& job);
  void Close();
  void Work(Worker& worker);
  int32_t AwaitChange(int32_t seen);
  bool IsForked() const;

  const pid_t owner_;
  std::mutex session_;
  Scratch scratch_;

  // Read by the workers in an open Run, changed by the caller between two.
  const std::vector<ThreadPlace> places_;
  std::vector<int> memory_nodes_;
  std::vector<int> place_of_cpu_;     // -1: none
  std::vector<Worker*> occupant_of_;  // by place; null: the caller
  int caller_place_ = 0;
  TaskThread caller_{0};
  Job job_;
  std::vector<TaskList> lists_;  // one per node

  // Odd while a Run is open. A worker says that it is busy, looks again, and only then takes part; the caller
  // ends the Run, and then waits for those that are busy. Either the worker sees the end or the caller sees
  // the worker. A worker that is late, asleep or descheduled holds nobody up.
  alignas(64) std::atomic<int32_t> generation_{0};
  alignas(64) std::atomic<int32_t> sleepers_{0};
  std::atomic<bool> stopping_{false};

  std::unique_ptr<std::vector<std::unique_ptr<Worker>>> workers_;
};

class ThreadPool::Session {
 public:
  explicit Session(ThreadPool& pool);

  // Calls f(task) for every task in [0, num_tasks) and returns when all are done. Tasks are claimed in
  // ascending order by whichever thread is free, and must not open a session of the same pool. f may take the
  // thread as well: f(task, TaskThread&).
  template <typename F>
  void Run(int64_t num_tasks, F&& f) {
    RunLists(1, num_tasks, [&f](int, int64_t task, TaskThread& thread) noexcept {
      if constexpr (std::is_invocable_v<F&, int64_t, TaskThread&>) {
        static_assert(noexcept(f(task, thread)), "an exception in a worker would end the program");
        f(task, thread);
      } else {
        static_assert(noexcept(f(task)), "an exception in a worker would end the program");
        f(task);
      }
    });
  }

  // Calls f(node, task) for every node in [0, num_nodes()) and every task in [0, tasks_per_node). A thread
  // claims the tasks of its own node first and then helps the others, so that the nodes may have unequal
  // numbers of threads and a thread may be kept from running. f may take the thread as well: f(node, task,
  // TaskThread&).
  template <typename F>
  void RunByNode(int64_t tasks_per_node, F&& f) {
    RunLists(num_nodes(), tasks_per_node, [&f](int node, int64_t task, TaskThread& thread) noexcept {
      if constexpr (std::is_invocable_v<F&, int, int64_t, TaskThread&>) {
        static_assert(noexcept(f(node, task, thread)), "an exception in a worker would end the program");
        f(node, task, thread);
      } else {
        static_assert(noexcept(f(node, task)), "an exception in a worker would end the program");
        f(node, task);
      }
    });
  }

  // Memory for this session, which all its tasks may use; the next session reuses it.
  Scratch& scratch() { return pool_.scratch_; }
  int num_threads() const { return pool_.num_threads(); }
  int num_nodes() const { return pool_.num_nodes(); }

 private:
  template <typename F>
  void RunLists(int num_lists, int64_t tasks_per_list, F&& f) {
    auto call = [](void* context, int node, int64_t task, TaskThread& thread) {
      (*static_cast<std::remove_reference_t<F>*>(context))(node, task, thread);
    };
    const Job job{call, &f, num_lists, tasks_per_list};
    if (is_forked_) {
      pool_.RunAlone(job);
    } else {
      pool_.Run(job);
    }
  }

  ThreadPool& pool_;
  const bool is_forked_;
  const DefaultFloatEnvironment environment_;
  std::unique_lock<std::mutex> lock_;
};

}  // namespace hmoe
