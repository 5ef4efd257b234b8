// A value as it is, but not before another one is there: an order that no pass of the compiler can see
// through.

#include <cstring>

#include "xla/arguments.h"
#include "xla/handlers.h"

namespace hmoe {
namespace {

ffi::Error Handle(ffi::AnyBuffer value, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer> out) {
  if (value.size_bytes() != out->size_bytes()) {
    return ToXla(Fail("result: expected ", value.size_bytes(), " bytes, got ", out->size_bytes()));
  }
  // They are the same memory, unless a program does not donate the value.
  if (value.untyped_data() != out->untyped_data()) {
    std::memcpy(out->untyped_data(), value.untyped_data(), value.size_bytes());
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kHandler, Handle,
                       ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());

}  // namespace

XLA_FFI_Handler* const kInOrderHandler = kHandler;

}  // namespace hmoe
