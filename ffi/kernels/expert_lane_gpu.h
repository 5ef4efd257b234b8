// Jobs of an expert lane for activations that lie in a GPU's memory, in the order of a stream of the GPU's.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels/expert_lane.h"
#include "kernels/gpu_staging.h"

namespace hmoe {

// Submit and Wait only put work on the stream and return: the host runs ahead of the GPU, and nobody waits
// but the stream. What fails while it runs is noted at the lane (ExpertLane::TakeFailure), as no call is left
// to return it.
class GpuExpertLane {
 public:
  explicit GpuExpertLane(std::shared_ptr<const GpuDriver> driver) : driver_(std::move(driver)) {}

  // Copies of the operands to the host; then the job is in the lane's queue. `ticket` is written on the
  // device.
  Status Submit(const std::shared_ptr<ExpertLane>& lane, int64_t slot, const ExpertOperands& operands,
                int32_t* ticket, void* stream);

  // Waiting for the last job that was submitted in the slot; then the copy of its result.
  Status Wait(const std::shared_ptr<ExpertLane>& lane, int64_t slot, float* out, void* stream);

 private:
  // What the host's functions find of a slot's job, on the way between copies.
  struct Call {
    std::weak_ptr<ExpertLane> lane;
    int64_t slot;
    GpuStaging staging;
    int32_t ticket = 0;
  };
  // What one of them is called with: it keeps the lane until then.
  struct Launched {
    std::shared_ptr<ExpertLane> lane;
    std::shared_ptr<Call> call;
  };
  static void Begin(void* launched);
  static void End(void* launched);
  std::shared_ptr<Call> CallOf(const std::shared_ptr<ExpertLane>& lane, int64_t slot);
  Status Launch(void (*function)(void*), Launched launched, void* stream) const;

  const std::shared_ptr<const GpuDriver> driver_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Call>> calls_;  // of lanes that there still are
};

}  // namespace hmoe
