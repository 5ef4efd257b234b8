#include "kernels/gpu_staging.h"

#include <tuple>
#include <utility>

#include "codec/codec.h"
#include "store/expert_store.h"

namespace hmoe {

Status GpuStaging::Reserve(const std::shared_ptr<const GpuDriver>& driver, int64_t tokens, int64_t choices,
                           int64_t width, void* stream) {
  int64_t bytes = 0;
  const auto place = [&](int64_t size) { return std::exchange(bytes, bytes + RoundUp(size, kRecordAlign)); };
  const int64_t layer_at = place(4), ids_at = place(4 * tokens * choices),
                weights_at = place(4 * tokens * choices);
  const int64_t hidden_at = place(2 * tokens * width), out_at = place(4 * tokens * width);
  const bool is_room = pages_ && std::ssize(pages_->bytes()) >= bytes;
  const bool is_same = tokens == tokens_ && choices == choices_ && width == width_;
  if (is_room && is_same) return {};
  // What was put on the stream before finds its operands where they were meant to be.
  if (Status idle = driver->Synchronize(stream); !idle.ok()) return idle;
  if (!is_room) {
    pinned_.reset();
    auto pages = Pages::Allocate(bytes);
    if (!pages.ok()) return pages.error();
    pages_ = std::move(pages).value();
    // Where nothing can be pinned, copies of pageable memory are right too, and slower.
    if (auto pinned = PinnedMemory::Create(driver, pages_->bytes()); pinned.ok())
      pinned_ = std::move(pinned).value();
  }
  std::tie(tokens_, choices_, width_) = std::tuple(tokens, choices, width);
  std::tie(layer_at_, ids_at_, weights_at_, hidden_at_, out_at_) =
      std::tuple(layer_at, ids_at, weights_at, hidden_at, out_at);
  return {};
}

Status GpuStaging::CopyOperands(const GpuDriver& driver, const ExpertOperands& operands, void* stream) {
  const int64_t slots = tokens_ * choices_;
  for (const auto& [to, from, size] :
       {std::tuple<void*, const void*, int64_t>{At<int32_t>(layer_at_), operands.layer, 4},
        {At<int32_t>(ids_at_), operands.routing.ids, 4 * slots},
        {At<float>(weights_at_), operands.routing.weights, 4 * slots},
        {At<uint16_t>(hidden_at_), operands.hidden, 2 * tokens_ * width_}}) {
    if (Status s = driver.CopyToHost(to, from, size, stream); !s.ok()) return s;
  }
  return {};
}

Status GpuStaging::CopyResult(const GpuDriver& driver, float* out, void* stream) const {
  return driver.CopyToDevice(out, At<float>(out_at_), 4 * tokens_ * width_, stream);
}

}  // namespace hmoe
