// Host memory through which a GPU's activations reach the experts and come back.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "base/result.h"
#include "kernels/routing.h"
#include "machine/gpu_driver.h"
#include "machine/memory.h"

namespace hmoe {

// Room for the operands and the result of a call, pinned where it can be.
class GpuStaging {
 public:
  // Makes room for so many tokens with so many experts each. If that changes anything, the stream is awaited
  // first.
  Status Reserve(const std::shared_ptr<const GpuDriver>& driver, int64_t tokens, int64_t choices,
                 int64_t width, void* stream);

  // Puts copies on the GPU's stream: of operands in its memory to this memory, and of the result from it.
  Status CopyOperands(const GpuDriver& driver, const ExpertOperands& operands, void* stream);
  Status CopyResult(const GpuDriver& driver, float* out, void* stream) const;

  // What lies here once the copies are done.
  int32_t layer() const { return *At<int32_t>(layer_at_); }
  Routing routing() const { return {At<int32_t>(ids_at_), At<float>(weights_at_), tokens_, choices_}; }
  const uint16_t* hidden() const { return At<uint16_t>(hidden_at_); }
  float* out() const { return At<float>(out_at_); }

 private:
  template <typename T>
  T* At(int64_t offset) const {
    return reinterpret_cast<T*>(pages_->bytes().data() + offset);
  }

  std::optional<Pages> pages_;
  std::optional<PinnedMemory> pinned_;  // goes first
  int64_t tokens_ = 0, choices_ = 0, width_ = 0;
  int64_t layer_at_ = 0, ids_at_ = 0, weights_at_ = 0, hidden_at_ = 0, out_at_ = 0;
};

}  // namespace hmoe
