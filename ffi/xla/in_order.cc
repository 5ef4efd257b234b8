// A value as it is, but not before another one is there: an order that no pass of the compiler can see
// through.

#include "xla/arguments.h"
#include "xla/handlers.h"

namespace hmoe {
namespace {

// The result is the value's own memory, which the program says by aliasing: on every platform there is
// nothing to do.
ffi::Error Handle(ffi::AnyBuffer value, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer> out) {
  if (value.untyped_data() == out->untyped_data()) return ffi::Error::Success();
  return ToXla(
      Fail("result: expected the memory of the value, of ", value.size_bytes(), " bytes, got another one"));
}

XLA_FFI_DEFINE_HANDLER(kHandler, Handle,
                       ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());

}  // namespace

XLA_FFI_Handler* const kInOrderHandler = kHandler;

}  // namespace hmoe
