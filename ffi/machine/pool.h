// The threads that compute: pinned, awake while there is work, asleep soon after.
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

namespace hmoe {

// `num_threads` threads including the caller of Run. A call (one FFI call, several Runs) holds a Session;
// callers in other threads wait for their turn. In a process forked from the owner the other threads do not
// exist, and Run does all the work on the caller.
//
// XLA's intra-op pool is not used: blocking in it can deadlock.
class ThreadPool {
 public:
  // Fails when the system does not give the threads; those that it gave are ended first.
  static Result<std::unique_ptr<ThreadPool>> Create(int num_threads);
  ~ThreadPool();  // no session may be open
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  class Session {
   public:
    explicit Session(ThreadPool& pool);

    // Calls f(task) for every task in [0, num_tasks), claimed in ascending order, and returns when all are
    // done. Tasks must not open a session of the same pool.
    template <typename F>
    void Run(int64_t num_tasks, F&& f) {
      static_assert(noexcept(f(int64_t{0})), "an exception in a worker would end the program");
      auto call = [](void* context, int64_t task) {
        (*static_cast<std::remove_reference_t<F>*>(context))(task);
      };
      pool_.RunTasks({call, &f}, num_tasks);
    }

    // Memory for this session; the next session reuses it.
    Scratch& scratch() { return pool_.scratch_; }
    int num_threads() const { return pool_.num_threads_; }

   private:
    ThreadPool& pool_;
    std::unique_lock<std::mutex> lock_;
  };

 private:
  struct Job {
    void (*call)(void* context, int64_t task) = nullptr;
    void* context = nullptr;
  };

  explicit ThreadPool(int num_threads);
  void StartWorkers();
  void RunTasks(Job job, int64_t num_tasks);
  bool RunOneTask();
  void Work(int cpu);
  bool IsForked() const;

  const int num_threads_;
  const pid_t owner_;
  std::mutex session_;
  Scratch scratch_;

  // A task is claimed by taking one from `unclaimed_`. While a claimed task runs, `unfinished_` is above zero
  // and the caller stays in RunTasks, so job_ and num_tasks_ stand still for whoever claimed; nobody else
  // reads them.
  Job job_;
  int64_t num_tasks_ = 0;
  alignas(64) std::atomic<int64_t> unclaimed_{0};
  alignas(64) std::atomic<int32_t> unfinished_{0};  // 32 bits: what a futex can wait on
  alignas(64) std::atomic<int32_t> generation_{0};  // changes with every Run and at shutdown
  std::atomic<bool> stopping_{false};

  std::unique_ptr<std::vector<std::thread>> workers_;
};

}  // namespace hmoe
