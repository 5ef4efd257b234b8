// The routed experts of one layer by the CPU, for activations that lie in a GPU's memory.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "kernels/moe_experts.h"
#include "machine/gpu_driver.h"
#include "machine/memory.h"

namespace hmoe {

// The operands of MoeExperts, all in the memory of the GPU whose stream is given.
struct GpuOperands {
  const int32_t* layer;
  const uint16_t* hidden;
  Routing routing;
  float* out;
};

// Brings the operands to the host, computes there, and puts the result on its way back: when it has returned,
// the stream has waited for the CPU.
class GpuMoeExperts {
 public:
  explicit GpuMoeExperts(std::shared_ptr<const GpuDriver> driver) : driver_(std::move(driver)) {}

  Status Run(ExpertStore& store, const GpuOperands& operands, void* stream);

 private:
  struct Staging {
    std::optional<Pages> pages;
    std::optional<PinnedMemory> pinned;  // goes first
  };
  Result<uint8_t*> StagingOf(void* stream, int64_t bytes);

  const std::shared_ptr<const GpuDriver> driver_;
  std::mutex mutex_;
  // One for each stream, whose calls come one after the other: what is on its way back is still read when the
  // next call begins, and not any more when that has its operands.
  std::map<void*, Staging> staging_;
};

}  // namespace hmoe
