// The driver of NVIDIA's GPUs, found at run time: to build takes neither its headers nor a toolkit.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "base/result.h"

namespace hmoe {

inline constexpr const char* kGpuDriverLibrary = "libcuda.so.1";

// For use by several threads at once.
class GpuDriver {
 public:
  // Loads the library, and holds the first device's primary context, the one that XLA uses too. Fails with
  // the reason where there is no such library, no device, or a function is missing.
  static Result<std::shared_ptr<const GpuDriver>> Open(const std::string& library = kGpuDriverLibrary);
  ~GpuDriver();
  GpuDriver(const GpuDriver&) = delete;
  GpuDriver& operator=(const GpuDriver&) = delete;

  // Locks whole pages in memory, for every device to read and write at their own speed; a copy must not cross
  // from one such range into the next. Unregister takes the same range.
  Status Register(std::span<uint8_t> memory) const;
  Status Unregister(std::span<uint8_t> memory) const;

  // Copies in the order of a stream of XLA's, on the stream's own device; they return before they are done.
  Status CopyToHost(void* to, const void* from, int64_t bytes, void* stream) const;
  Status CopyToDevice(void* to, const void* from, int64_t bytes, void* stream) const;
  Status Synchronize(void* stream) const;

  // Calls a function of the host when the stream comes to it, which waits until it returns. It must not call
  // the driver.
  Status LaunchHost(void (*function)(void*), void* argument, void* stream) const;

 private:
  class Current;
  struct Functions;

  GpuDriver();
  Status Load(const std::string& library);
  Status Check(const char* function, int error) const;
  Status OnStream(void* stream, const char* function, auto call) const;

  void* library_ = nullptr;
  std::unique_ptr<Functions> functions_;
  void* context_ = nullptr;
  int device_ = 0;
};

// Registered while it lives. The memory must live longer.
class PinnedMemory {
 public:
  static Result<PinnedMemory> Create(std::shared_ptr<const GpuDriver> driver, std::span<uint8_t> memory) {
    if (Status registered = driver->Register(memory); !registered.ok()) return registered.error();
    return PinnedMemory(std::move(driver), memory);
  }
  PinnedMemory(PinnedMemory&& other) noexcept = default;
  PinnedMemory& operator=(PinnedMemory&& other) noexcept = default;
  ~PinnedMemory() {
    if (driver_) (void)driver_->Unregister(memory_);  // fails only when the driver has ended already
  }

 private:
  PinnedMemory(std::shared_ptr<const GpuDriver> driver, std::span<uint8_t> memory)
      : driver_(std::move(driver)), memory_(memory) {}

  std::shared_ptr<const GpuDriver> driver_;  // null when moved from
  std::span<uint8_t> memory_;
};

}  // namespace hmoe
