// Checks of what XLA hands to a handler: every failure names the argument, what was expected and what came.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "base/result.h"
#include "xla/ffi/api/ffi.h"

namespace hmoe {

namespace ffi = xla::ffi;

inline constexpr int64_t kAnySize = -1;

// Fails unless the buffer has one of the dtypes and the shape (kAnySize fits every size).
Status CheckArgument(const char* name, const ffi::AnyBuffer& buffer,
                     std::initializer_list<ffi::DataType> dtypes, std::initializer_list<int64_t> shape);

ffi::Error ToXla(const Status& status);

template <typename T>
T* DataOf(ffi::AnyBuffer buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// A binding with so many buffers as arguments.
template <int kCount, typename B>
auto WithArguments(B&& binding) {
  if constexpr (kCount == 1) {
    return std::move(binding).template Arg<ffi::AnyBuffer>();
  } else {
    return WithArguments<kCount - 1>(std::move(binding).template Arg<ffi::AnyBuffer>());
  }
}

}  // namespace hmoe
