// The routed experts of one layer by the CPU, for activations that lie in a GPU's memory.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "kernels/gpu_staging.h"
#include "kernels/moe_experts.h"

namespace hmoe {

// Brings the operands to the host, computes there, and puts the result on its way back: when it has returned,
// the stream has waited for the CPU.
class GpuMoeExperts {
 public:
  explicit GpuMoeExperts(std::shared_ptr<const GpuDriver> driver) : driver_(std::move(driver)) {}

  Status Run(ExpertStore& store, const ExpertOperands& operands, void* stream);

 private:
  const std::shared_ptr<const GpuDriver> driver_;
  std::mutex mutex_;
  // One for each stream, whose calls come one after the other: what is on its way back is still read when the
  // next call begins, and not any more when that has its operands.
  std::map<void*, GpuStaging> staging_;
};

}  // namespace hmoe
