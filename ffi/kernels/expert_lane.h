// Routed experts computed beside somebody else's work: a thread takes jobs in the order in which they come.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/result.h"
#include "kernels/routing.h"
#include "store/expert_store.h"

namespace hmoe {

// One job over its life, in nanoseconds of the steady clock: from when its operands were copied until
// somebody had its result, which that one awaited from `awaited` on.
struct JobTimes {
  int64_t slot = 0, layer = 0;
  int64_t submitted = 0, begun = 0, done = 0, awaited = 0, fetched = 0;
};

// A job lives in one of a few slots, from Submit to the next Submit in that slot. It owns copies of its
// operands and of its result, so that nobody waits for memory of somebody else's. Its ticket says which of
// the slot's jobs it is. Several threads may use a lane, each with slots of its own.
class ExpertLane {
 public:
  // Starts the thread, on the CPU of the first thread of the store's pool. `patience` is how long Wait and
  // Submit wait for a job before they take it for lost; they do not wait for a lost one again.
  static Result<std::shared_ptr<ExpertLane>> Create(std::shared_ptr<ExpertStore> store, int num_slots,
                                                    std::chrono::milliseconds patience);
  ~ExpertLane();  // waits for the job that is under way, and forgets the others
  ExpertLane(const ExpertLane&) = delete;
  ExpertLane& operator=(const ExpertLane&) = delete;

  const std::shared_ptr<ExpertStore>& store() const { return store_; }

  // Copies the operands (see MoeExperts) and returns the ticket, which is above 0. Waits for the slot's last
  // job.
  Result<int32_t> Submit(int64_t slot, int64_t layer, const uint16_t* hidden, const Routing& routing);

  // Waits until the job is done and copies its result, [tokens, hidden]. Fails as the job failed.
  Status Wait(int64_t slot, int32_t ticket, int64_t tokens, float* out);

  // Whether Wait would return at once. A job that was replaced in its slot is done.
  Result<bool> IsDone(int64_t slot, int32_t ticket);

  // What failed where no caller could be told, the first since this was last asked.
  void NoteFailure(const Error& failure);
  Status TakeFailure();

  // Time in which jobs were computed, and in which somebody waited for them, so far.
  std::chrono::nanoseconds busy() const { return std::chrono::nanoseconds(busy_ns_); }
  std::chrono::nanoseconds waited() const { return std::chrono::nanoseconds(waited_ns_); }

  // Of the last `kKeptJobs` that were awaited, oldest first.
  std::vector<JobTimes> Jobs();
  static constexpr size_t kKeptJobs = 1 << 14;

 private:
  struct Slot {
    int64_t layer = 0, tokens = 0, choices = 0;
    std::vector<uint16_t> hidden;
    std::vector<int32_t> ids;
    std::vector<float> weights, out;
    Status status;
    JobTimes times;
    int32_t ticket = 0, lost = 0;  // of the last job, and of the last that was taken for lost
    std::atomic<int32_t> done{0};  // the last job that is
  };

  ExpertLane(std::shared_ptr<ExpertStore> store, int num_slots, std::chrono::milliseconds patience);
  Result<Slot*> Find(int64_t slot);
  Status Await(Slot& slot) const;
  void Work();
  void Compute(Slot& slot);
  void Note(Slot& slot, int64_t awaited);

  const std::shared_ptr<ExpertStore> store_;
  const std::chrono::milliseconds patience_;
  std::vector<std::unique_ptr<Slot>> slots_;

  // The queue: a slot holds one job at most, so that there is always room for a submitted one.
  std::mutex submitting_;  // failure_ and jobs_ as well
  Status failure_;
  std::vector<JobTimes> jobs_;  // a ring, once it is full
  size_t num_noted_ = 0;
  std::vector<Slot*> order_;
  alignas(64) std::atomic<int32_t> submitted_{0};
  alignas(64) std::atomic<int64_t> busy_ns_{0};
  std::atomic<int64_t> waited_ns_{0};
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace hmoe
