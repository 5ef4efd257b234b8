#include "kernels/moe_experts_gpu.h"

namespace hmoe {

Status GpuMoeExperts::Run(ExpertStore& store, const ExpertOperands& operands, void* stream) {
  GpuStaging& staging = [&]() -> GpuStaging& {
    const std::lock_guard lock(mutex_);
    return staging_[stream];
  }();
  const Routing& routing = operands.routing;
  const int64_t width = store.shape().hidden;
  if (Status s = staging.Reserve(driver_, routing.tokens, routing.slots, width, stream); !s.ok()) return s;
  if (Status s = staging.CopyOperands(*driver_, operands, stream); !s.ok()) return s;
  if (Status s = driver_->Synchronize(stream); !s.ok()) return s;
  const Status computed =
      MoeExperts(store, staging.layer(), staging.hidden(), staging.routing(), staging.out());
  if (!computed.ok()) return computed;
  return staging.CopyResult(*driver_, operands.out, stream);
}

}  // namespace hmoe
