// A GPU's driver for machines without one: it keeps the rules that matter to us, writes down what it was
// asked, and fails where a test wants it to. The "device" is host memory.
//
// Calls are logged as "register 4096 bytes"; `stand_in_fail("cuMemHostRegister_v2", 2, 2)` makes the second
// call from now on return CUDA_ERROR_OUT_OF_MEMORY.

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

namespace {

enum Error {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kInvalidContext = 201,
  kAlreadyRegistered = 712,
  kNotRegistered = 713,
};

int the_context;
thread_local int depth = 0;  // of contexts that are current

std::mutex mutex;
std::string calls;
std::string answer;  // the text that stand_in_calls returned last
std::map<uintptr_t, size_t> registered;
int retained = 0;
std::string failing;
int failing_in = 0, failing_with = 0;

// Whether this call shall fail, and with what.
int Injected(const char* function) {
  if (failing != function || --failing_in != 0) return kSuccess;
  failing.clear();
  return failing_with;
}

void Log(const std::string& call) { calls += call + '\n'; }

// Whether some of the memory, but not all of it, lies in one registered range.
bool CrossesASeam(const void* memory, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  for (const auto& [first, size] : registered) {
    const bool overlaps = begin < first + size && first < begin + bytes;
    const bool contains = first <= begin && begin + bytes <= first + size;
    if (overlaps && !contains) return true;
  }
  return false;
}

int Copy(const char* function, void* to, const void* from, size_t bytes, const void* host) {
  const std::lock_guard lock(mutex);
  if (depth == 0) return kInvalidContext;
  if (const int error = Injected(function)) return error;
  if (CrossesASeam(host, bytes)) return kInvalidValue;
  Log((host == to ? "to host " : "to device ") + std::to_string(bytes) + " bytes");
  std::memcpy(to, from, bytes);
  return kSuccess;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int cuInit(unsigned) {
  const std::lock_guard lock(mutex);
  return Injected("cuInit");
}

EXPORT int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return kSuccess;
}

EXPORT int cuDevicePrimaryCtxRetain(void** context, int) {
  const std::lock_guard lock(mutex);
  if (const int error = Injected("cuDevicePrimaryCtxRetain")) return error;
  *context = &the_context;
  ++retained;
  return kSuccess;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int) {
  const std::lock_guard lock(mutex);
  --retained;
  return kSuccess;
}

EXPORT int cuCtxPushCurrent_v2(void* context) {
  if (context != &the_context) return kInvalidContext;
  ++depth;
  return kSuccess;
}

EXPORT int cuCtxPopCurrent_v2(void** context) {
  if (depth == 0) return kInvalidContext;
  *context = &the_context;
  --depth;
  return kSuccess;
}

EXPORT int cuStreamGetCtx(void*, void** context) {
  *context = &the_context;
  return kSuccess;
}

EXPORT int cuMemHostRegister_v2(void* memory, size_t bytes, unsigned) {
  const std::lock_guard lock(mutex);
  if (depth == 0) return kInvalidContext;
  if (const int error = Injected("cuMemHostRegister_v2")) return error;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  if (begin % page != 0 || bytes % page != 0 || bytes == 0) return kInvalidValue;
  for (const auto& [other, size] : registered) {
    if (begin < other + size && other < begin + bytes) return kAlreadyRegistered;
  }
  registered[begin] = bytes;
  Log("register " + std::to_string(bytes) + " bytes");
  return kSuccess;
}

EXPORT int cuMemHostUnregister(void* memory) {
  const std::lock_guard lock(mutex);
  if (depth == 0) return kInvalidContext;
  const auto found = registered.find(reinterpret_cast<uintptr_t>(memory));
  if (found == registered.end()) return kNotRegistered;
  // A driver would not notice, and the next copy would end the process: the memory must still be there.
  *static_cast<volatile uint8_t*>(memory) = *static_cast<volatile uint8_t*>(memory);
  Log("unregister " + std::to_string(found->second) + " bytes");
  registered.erase(found);
  return kSuccess;
}

EXPORT int cuMemcpyDtoHAsync_v2(void* to, uintptr_t from, size_t bytes, void*) {
  return Copy("cuMemcpyDtoHAsync_v2", to, reinterpret_cast<const void*>(from), bytes, to);
}

EXPORT int cuMemcpyHtoDAsync_v2(uintptr_t to, const void* from, size_t bytes, void*) {
  return Copy("cuMemcpyHtoDAsync_v2", reinterpret_cast<void*>(to), from, bytes, from);
}

EXPORT int cuStreamSynchronize(void*) {
  const std::lock_guard lock(mutex);
  if (depth == 0) return kInvalidContext;
  if (const int error = Injected("cuStreamSynchronize")) return error;
  Log("synchronize");
  return kSuccess;
}

// The stream has come to it at once. As with a real driver, the function has no context.
EXPORT int cuLaunchHostFunc(void*, void (*function)(void*), void* argument) {
  {
    const std::lock_guard lock(mutex);
    if (depth == 0) return kInvalidContext;
    if (const int error = Injected("cuLaunchHostFunc")) return error;
    Log("call the host");
  }
  const int before = std::exchange(depth, 0);
  function(argument);
  depth = before;
  return kSuccess;
}

EXPORT int cuGetErrorString(int error, const char** text) {
  *text = error == kOutOfMemory         ? "out of memory"
          : error == kAlreadyRegistered ? "already registered"
                                        : "failed";
  return kSuccess;
}

// What was asked since the last call of this, a line each. The text is valid until then.
EXPORT const char* stand_in_calls() {
  const std::lock_guard lock(mutex);
  answer.swap(calls);
  calls.clear();
  return answer.c_str();
}

EXPORT void stand_in_fail(const char* function, int in_calls, int error) {
  const std::lock_guard lock(mutex);
  std::tie(failing, failing_in, failing_with) = std::tuple(std::string(function), in_calls, error);
}

EXPORT int64_t stand_in_registered() {
  const std::lock_guard lock(mutex);
  int64_t bytes = 0;
  for (const auto& [_, size] : registered) bytes += static_cast<int64_t>(size);
  return bytes;
}

EXPORT int stand_in_contexts() {
  const std::lock_guard lock(mutex);
  return retained;
}
