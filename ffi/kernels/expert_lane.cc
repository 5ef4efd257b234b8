#include "kernels/expert_lane.h"

#include <algorithm>
#include <limits>
#include <system_error>
#include <utility>

#include "kernels/moe_experts.h"
#include "machine/places.h"
#include "machine/wait.h"

namespace hmoe {
namespace {

int64_t Now() { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); }

}  // namespace

Result<std::shared_ptr<ExpertLane>> ExpertLane::Create(std::shared_ptr<ExpertStore> store, int num_slots,
                                                       std::chrono::milliseconds patience) {
  if (num_slots < 1) return Fail("num_slots: expected at least 1, got ", num_slots);
  const int cpu = store->pool().first_cpu();
  std::shared_ptr<ExpertLane> lane(new ExpertLane(std::move(store), num_slots, patience));
  try {
    lane->thread_ = std::thread([raw = lane.get()] { raw->Work(); });
  } catch (const std::system_error& refusal) {
    return Fail("an expert lane needs a thread: ", refusal.code().message());
  }
  Pin(lane->thread_, cpu);
  return lane;
}

ExpertLane::ExpertLane(std::shared_ptr<ExpertStore> store, int num_slots, std::chrono::milliseconds patience)
    : store_(std::move(store)), patience_(patience), order_(static_cast<size_t>(num_slots)) {
  for (int i = 0; i < num_slots; ++i) slots_.push_back(std::make_unique<Slot>());
}

ExpertLane::~ExpertLane() {
  stopping_.store(true, std::memory_order_seq_cst);
  submitted_.fetch_add(1, std::memory_order_seq_cst);
  WakeSleepers(submitted_, 1);
  if (thread_.joinable()) thread_.join();
}

Result<int32_t> ExpertLane::Submit(int64_t slot, int64_t layer, const uint16_t* hidden,
                                   const Routing& routing) {
  const auto found = Find(slot);
  if (!found.ok()) return found.error();
  Slot& job = *found.value();
  if (Status idle = Await(job); !idle.ok()) return idle.error();

  const int64_t choices = routing.tokens * routing.slots;
  job.layer = layer;
  job.tokens = routing.tokens;
  job.choices = routing.slots;
  job.hidden.assign(hidden, hidden + routing.tokens * store_->shape().hidden);
  job.ids.assign(routing.ids, routing.ids + choices);
  job.weights.assign(routing.weights, routing.weights + choices);
  job.out.resize(static_cast<size_t>(routing.tokens * store_->shape().hidden));
  job.times = {.slot = slot, .layer = layer, .submitted = Now()};
  job.ticket = job.ticket == std::numeric_limits<int32_t>::max() ? 1 : job.ticket + 1;

  const std::lock_guard lock(submitting_);
  const auto place = static_cast<uint32_t>(submitted_.load(std::memory_order_relaxed)) % order_.size();
  order_[place] = &job;
  submitted_.fetch_add(1, std::memory_order_seq_cst);
  WakeSleepers(submitted_, 1);
  return job.ticket;
}

Status ExpertLane::Wait(int64_t slot, int32_t ticket, int64_t tokens, float* out) {
  const int64_t awaited = Now();
  const auto found = Find(slot);
  if (!found.ok()) return found.error();
  Slot& job = *found.value();
  if (ticket != job.ticket) return Fail("ticket ", ticket, " of slot ", slot, ": its job is ", job.ticket);
  if (tokens != job.tokens)
    return Fail("slot ", slot, ": ", job.tokens, " tokens were submitted, ", tokens, " are awaited");
  if (Status done = Await(job); !done.ok()) return done;
  if (job.status.ok()) std::copy(job.out.begin(), job.out.end(), out);
  Note(job, awaited);
  return job.status;
}

Result<bool> ExpertLane::IsDone(int64_t slot, int32_t ticket) {
  const auto found = Find(slot);
  if (!found.ok()) return found.error();
  const Slot& job = *found.value();
  return ticket != job.ticket || job.done.load(std::memory_order_acquire) == ticket;
}

void ExpertLane::Note(Slot& slot, int64_t awaited) {
  JobTimes& times = slot.times;
  if (times.fetched != 0) return;  // again
  times.awaited = awaited;
  times.fetched = Now();
  waited_ns_ += times.fetched - awaited;
  const std::lock_guard lock(submitting_);
  if (jobs_.size() < kKeptJobs) {
    jobs_.push_back(times);
  } else {
    jobs_[num_noted_ % kKeptJobs] = times;
  }
  ++num_noted_;
}

std::vector<JobTimes> ExpertLane::Jobs() {
  const std::lock_guard lock(submitting_);
  std::vector<JobTimes> ordered = jobs_;
  const size_t oldest = jobs_.size() < kKeptJobs ? 0 : num_noted_ % kKeptJobs;
  std::rotate(ordered.begin(), ordered.begin() + static_cast<std::ptrdiff_t>(oldest), ordered.end());
  return ordered;
}

void ExpertLane::NoteFailure(const Error& failure) {
  const std::lock_guard lock(submitting_);
  if (failure_.ok()) failure_ = failure;
}

Status ExpertLane::TakeFailure() {
  const std::lock_guard lock(submitting_);
  return std::exchange(failure_, {});
}

Result<ExpertLane::Slot*> ExpertLane::Find(int64_t slot) {
  if (slot < 0 || slot >= std::ssize(slots_)) {
    return Fail("slot: expected 0 to ", std::ssize(slots_) - 1, ", got ", slot);
  }
  return slots_[static_cast<size_t>(slot)].get();
}

Status ExpertLane::Await(Slot& slot) const {
  const auto patience = slot.lost == slot.ticket ? std::chrono::milliseconds(0) : patience_;
  const auto deadline = std::chrono::steady_clock::now() + patience;
  for (int32_t done = slot.done.load(std::memory_order_acquire); done != slot.ticket;
       done = slot.done.load(std::memory_order_acquire)) {
    if (SpinWhile(slot.done, done)) continue;
    if (!SleepWhile(slot.done, done, deadline)) {
      slot.lost = slot.ticket;
      return Fail("the routed experts of layer ", slot.layer, " are not done after ", patience_.count(),
                  " ms");
    }
  }
  return {};
}

void ExpertLane::Work() {
  for (int32_t taken = 0;;) {
    // In this order: whoever sees the count that the end adds sees the end as well.
    const int32_t submitted = submitted_.load(std::memory_order_seq_cst);
    if (stopping_.load(std::memory_order_seq_cst)) return;
    if (submitted == taken) {
      if (!SpinWhile(submitted_, taken)) SleepWhile(submitted_, taken);
      continue;
    }
    Compute(*order_[static_cast<uint32_t>(taken) % order_.size()]);
    taken = static_cast<int32_t>(static_cast<uint32_t>(taken) + 1);
  }
}

void ExpertLane::Compute(Slot& slot) {
  slot.times.begun = Now();
  const Routing routing{slot.ids.data(), slot.weights.data(), slot.tokens, slot.choices};
  slot.status = MoeExperts(*store_, slot.layer, slot.hidden.data(), routing, slot.out.data());
  slot.times.done = Now();
  busy_ns_ += slot.times.done - slot.times.begun;
  slot.done.store(slot.ticket, std::memory_order_seq_cst);
  WakeSleepers(slot.done, 1);
}

}  // namespace hmoe
