#include "kernels/moe_experts_gpu.h"

#include <tuple>
#include <utility>

#include "codec/codec.h"

namespace hmoe {

Result<uint8_t*> GpuMoeExperts::StagingOf(void* stream, int64_t bytes) {
  Staging& staging = [&]() -> Staging& {
    const std::lock_guard lock(mutex_);
    return staging_[stream];
  }();
  if (!staging.pages || std::ssize(staging.pages->bytes()) < bytes) {
    if (Status idle = driver_->Synchronize(stream); !idle.ok()) return idle.error();
    staging.pinned.reset();
    auto pages = Pages::Allocate(bytes);
    if (!pages.ok()) return pages.error();
    staging.pages = std::move(pages).value();
    // Where nothing can be pinned, copies of pageable memory are right too, and slower.
    if (auto pinned = PinnedMemory::Create(driver_, staging.pages->bytes()); pinned.ok()) {
      staging.pinned = std::move(pinned).value();
    }
  }
  return staging.pages->bytes().data();
}

Status GpuMoeExperts::Run(ExpertStore& store, const GpuOperands& operands, void* stream) {
  const Routing& routing = operands.routing;
  const int64_t slots = routing.tokens * routing.slots, values = routing.tokens * store.shape().hidden;
  int64_t bytes = 0;
  const auto place = [&](int64_t size) { return std::exchange(bytes, bytes + RoundUp(size, kRecordAlign)); };
  const int64_t layer_at = place(4), ids_at = place(4 * slots), weights_at = place(4 * slots);
  const int64_t hidden_at = place(2 * values), out_at = place(4 * values);
  const auto staging = StagingOf(stream, bytes);
  if (!staging.ok()) return staging.error();
  uint8_t* const host = staging.value();

  for (const auto& [to, from, size] : {std::tuple<int64_t, const void*, int64_t>{layer_at, operands.layer, 4},
                                       {ids_at, routing.ids, 4 * slots},
                                       {weights_at, routing.weights, 4 * slots},
                                       {hidden_at, operands.hidden, 2 * values}}) {
    if (Status s = driver_->CopyToHost(host + to, from, size, stream); !s.ok()) return s;
  }
  if (Status s = driver_->Synchronize(stream); !s.ok()) return s;
  const Routing chosen{reinterpret_cast<int32_t*>(host + ids_at), reinterpret_cast<float*>(host + weights_at),
                       routing.tokens, routing.slots};
  auto* const out = reinterpret_cast<float*>(host + out_at);
  const auto* const hidden = reinterpret_cast<uint16_t*>(host + hidden_at);
  const int32_t layer = *reinterpret_cast<int32_t*>(host + layer_at);
  if (Status s = MoeExperts(store, layer, hidden, chosen, out); !s.ok()) return s;
  return driver_->CopyToDevice(operands.out, out, 4 * values, stream);
}

}  // namespace hmoe
