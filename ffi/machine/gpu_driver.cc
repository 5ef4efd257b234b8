#include "machine/gpu_driver.h"

#include <dlfcn.h>

namespace hmoe {
namespace {

constexpr unsigned kPortable =
    1;  // registered memory is so for every context, and not for the current one alone

}  // namespace

// By the names that the library exports; what a suffix says is which version of the interface it is.
struct GpuDriver::Functions {
  int (*init)(unsigned flags);
  int (*device)(int* device, int ordinal);
  int (*retain)(void** context, int device);
  int (*release)(int device);
  int (*push)(void* context);
  int (*pop)(void** context);
  int (*context_of)(void* stream, void** context);
  int (*register_memory)(void* memory, size_t bytes, unsigned flags);
  int (*unregister_memory)(void* memory);
  int (*to_host)(void* to, uintptr_t from, size_t bytes, void* stream);
  int (*to_device)(uintptr_t to, const void* from, size_t bytes, void* stream);
  int (*synchronize)(void* stream);
  int (*launch_host)(void* stream, void (*function)(void*), void* argument);
  int (*describe)(int error, const char** text);
};

// A context is current for the thread, and XLA's threads have theirs.
class GpuDriver::Current {
 public:
  Current(const GpuDriver& driver, void* context)
      : driver_(driver), error_(driver.functions_->push(context)) {}
  ~Current() {
    void* context = nullptr;
    if (error_ == 0) driver_.functions_->pop(&context);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

  Status status() const { return driver_.Check("cuCtxPushCurrent", error_); }

 private:
  const GpuDriver& driver_;
  const int error_;
};

GpuDriver::GpuDriver() : functions_(std::make_unique<Functions>()) {}

Result<std::shared_ptr<const GpuDriver>> GpuDriver::Open(const std::string& library) {
  const std::shared_ptr<GpuDriver> driver(new GpuDriver());
  if (Status loaded = driver->Load(library); !loaded.ok()) return loaded.error();
  const Functions& call = *driver->functions_;
  if (Status done = driver->Check("cuInit", call.init(0)); !done.ok()) return done.error();
  int device = 0;
  if (Status done = driver->Check("cuDeviceGet", call.device(&device, 0)); !done.ok()) return done.error();
  void* context = nullptr;
  const Status retained = driver->Check("cuDevicePrimaryCtxRetain", call.retain(&context, device));
  if (!retained.ok()) return retained.error();
  driver->context_ = context;
  driver->device_ = device;
  return std::shared_ptr<const GpuDriver>(driver);
}

// The library stays loaded: others in the process use it, and it does not take being unloaded well.
GpuDriver::~GpuDriver() {
  if (context_ != nullptr) functions_->release(device_);
}

Status GpuDriver::Load(const std::string& library) {
  library_ = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library_ == nullptr) return Fail("the GPU's driver is not to be had: ", dlerror());
  const char* missing = nullptr;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library_, name));
    if (function == nullptr && missing == nullptr) missing = name;
  };
  find(functions_->init, "cuInit");
  find(functions_->device, "cuDeviceGet");
  find(functions_->retain, "cuDevicePrimaryCtxRetain");
  find(functions_->release, "cuDevicePrimaryCtxRelease_v2");
  find(functions_->push, "cuCtxPushCurrent_v2");
  find(functions_->pop, "cuCtxPopCurrent_v2");
  find(functions_->context_of, "cuStreamGetCtx");
  find(functions_->register_memory, "cuMemHostRegister_v2");
  find(functions_->unregister_memory, "cuMemHostUnregister");
  find(functions_->to_host, "cuMemcpyDtoHAsync_v2");
  find(functions_->to_device, "cuMemcpyHtoDAsync_v2");
  find(functions_->synchronize, "cuStreamSynchronize");
  find(functions_->launch_host, "cuLaunchHostFunc");
  find(functions_->describe, "cuGetErrorString");
  if (missing != nullptr) return Fail("the GPU's driver ", library, " has no function ", missing);
  return {};
}

Status GpuDriver::Check(const char* function, int error) const {
  if (error == 0) return {};
  const char* text = nullptr;
  if (functions_->describe(error, &text) != 0 || text == nullptr) text = "unknown error";
  return Fail("the GPU's driver: ", function, ": ", text, " (", error, ")");
}

Status GpuDriver::Register(std::span<uint8_t> memory) const {
  const Current current(*this, context_);
  if (Status entered = current.status(); !entered.ok()) return entered;
  return Check("cuMemHostRegister", functions_->register_memory(memory.data(), memory.size(), kPortable));
}

Status GpuDriver::Unregister(std::span<uint8_t> memory) const {
  const Current current(*this, context_);
  if (Status entered = current.status(); !entered.ok()) return entered;
  return Check("cuMemHostUnregister", functions_->unregister_memory(memory.data()));
}

Status GpuDriver::OnStream(void* stream, const char* function, auto call) const {
  void* context = nullptr;
  if (Status found = Check("cuStreamGetCtx", functions_->context_of(stream, &context)); !found.ok())
    return found;
  const Current current(*this, context);
  if (Status entered = current.status(); !entered.ok()) return entered;
  return Check(function, call());
}

Status GpuDriver::CopyToHost(void* to, const void* from, int64_t bytes, void* stream) const {
  return OnStream(stream, "cuMemcpyDtoHAsync", [&] {
    return functions_->to_host(to, reinterpret_cast<uintptr_t>(from), static_cast<size_t>(bytes), stream);
  });
}

Status GpuDriver::CopyToDevice(void* to, const void* from, int64_t bytes, void* stream) const {
  return OnStream(stream, "cuMemcpyHtoDAsync", [&] {
    return functions_->to_device(reinterpret_cast<uintptr_t>(to), from, static_cast<size_t>(bytes), stream);
  });
}

Status GpuDriver::Synchronize(void* stream) const {
  return OnStream(stream, "cuStreamSynchronize", [&] { return functions_->synchronize(stream); });
}

Status GpuDriver::LaunchHost(void (*function)(void*), void* argument, void* stream) const {
  return OnStream(stream, "cuLaunchHostFunc",
                  [&] { return functions_->launch_host(stream, function, argument); });
}

}  // namespace hmoe
