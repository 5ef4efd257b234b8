#include "kernels/expert_lane_gpu.h"

#include <algorithm>

namespace hmoe {
namespace {

constexpr int32_t kOneTicket = 1;  // jobs are told apart by the stream's order

}  // namespace

Status GpuExpertLane::Submit(const std::shared_ptr<ExpertLane>& lane, int64_t slot,
                             const ExpertOperands& operands, int32_t* ticket, void* stream) {
  if (Status failure = lane->TakeFailure(); !failure.ok()) return failure;
  const auto call = CallOf(lane, slot);
  const Routing& routing = operands.routing;
  const int64_t width = lane->store()->shape().hidden;
  if (Status s = call->staging.Reserve(driver_, routing.tokens, routing.slots, width, stream); !s.ok())
    return s;
  if (Status s = call->staging.CopyOperands(*driver_, operands, stream); !s.ok()) return s;
  if (Status s = Launch(Begin, {lane, call}, stream); !s.ok()) return s;
  return driver_->CopyToDevice(ticket, &kOneTicket, sizeof kOneTicket, stream);
}

Status GpuExpertLane::Wait(const std::shared_ptr<ExpertLane>& lane, int64_t slot, float* out, void* stream) {
  if (Status failure = lane->TakeFailure(); !failure.ok()) return failure;
  const auto call = CallOf(lane, slot);
  if (Status s = Launch(End, {lane, call}, stream); !s.ok()) return s;
  return call->staging.CopyResult(*driver_, out, stream);
}

void GpuExpertLane::Begin(void* launched) {
  const std::unique_ptr<Launched> owned(static_cast<Launched*>(launched));
  const auto& [lane, call] = *owned;
  const auto ticket =
      lane->Submit(call->slot, call->staging.layer(), call->staging.hidden(), call->staging.routing());
  call->ticket = ticket.ok() ? ticket.value() : 0;
  if (!ticket.ok()) lane->NoteFailure(ticket.error());
}

void GpuExpertLane::End(void* launched) {
  const std::unique_ptr<Launched> owned(static_cast<Launched*>(launched));
  const auto& [lane, call] = *owned;
  if (call->ticket == 0) return;  // it was not submitted, which is noted
  const Status done =
      lane->Wait(call->slot, call->ticket, call->staging.routing().tokens, call->staging.out());
  if (!done.ok()) lane->NoteFailure(done.error());
}

std::shared_ptr<GpuExpertLane::Call> GpuExpertLane::CallOf(const std::shared_ptr<ExpertLane>& lane,
                                                           int64_t slot) {
  const std::lock_guard lock(mutex_);
  std::erase_if(calls_, [](const auto& call) { return call->lane.expired(); });
  for (const auto& call : calls_) {
    if (call->lane.lock() == lane && call->slot == slot) return call;
  }
  calls_.push_back(std::make_shared<Call>(Call{lane, slot, {}, 0}));
  return calls_.back();
}

Status GpuExpertLane::Launch(void (*function)(void*), Launched launched, void* stream) const {
  auto owned = std::make_unique<Launched>(std::move(launched));
  const Status put = driver_->LaunchHost(function, owned.get(), stream);
  if (put.ok()) (void)owned.release();  // the function owns it
  return put;
}

}  // namespace hmoe
