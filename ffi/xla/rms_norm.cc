// Adapter: XLA buffers to hmoe::RmsNorm.

#include "kernels/rms_norm.h"

#include "machine/float_environment.h"
#include "xla/arguments.h"
#include "xla/handlers.h"

namespace hmoe {
namespace {

Status Run(ffi::AnyBuffer x, ffi::AnyBuffer weight, float eps, ffi::AnyBuffer out) {
  if (Status s = CheckArgument("x", x, {ffi::BF16}, {kAnySize, kAnySize}); !s.ok()) return s;
  const int64_t rows = x.dimensions()[0], cols = x.dimensions()[1];
  if (Status s = CheckArgument("weight", weight, {ffi::BF16}, {cols}); !s.ok()) return s;
  if (Status s = CheckArgument("result", out, {ffi::BF16}, {rows, cols}); !s.ok()) return s;
  const DefaultFloatEnvironment environment;
  RmsNorm(DataOf<const uint16_t>(x), DataOf<const uint16_t>(weight), rows, cols, eps, DataOf<uint16_t>(out));
  return {};
}

ffi::Error Handle(ffi::AnyBuffer x, ffi::AnyBuffer weight, float eps, ffi::Result<ffi::AnyBuffer> out) {
  return ToXla(Run(x, weight, eps, *out));
}

XLA_FFI_DEFINE_HANDLER(
    kHandler, Handle,
    ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Attr<float>("eps").Ret<ffi::AnyBuffer>());

}  // namespace

XLA_FFI_Handler* const kRmsNormHandler = kHandler;

}  // namespace hmoe
