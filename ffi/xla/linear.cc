// Adapter: XLA buffers to hmoe::Linear.

#include "kernels/linear.h"

#include <string_view>

#include "store/registry.h"
#include "xla/arguments.h"
#include "xla/handlers.h"

namespace hmoe {
namespace {

Status CheckWeight(const Codec& codec, const ffi::AnyBuffer& weight, int64_t cols) {
  if (codec.id == CodecId::kBf16) return CheckArgument("weight", weight, {ffi::BF16}, {kAnySize, cols});
  return CheckArgument("weight", weight, {ffi::F8E4M3FN, ffi::U8}, {kAnySize, cols});
}

Status CheckScale(const Codec& codec, const ffi::AnyBuffer& scale, int64_t rows, int64_t cols) {
  if (!codec.has_scales) return CheckArgument("scale", scale, {ffi::F32}, {0, 0});
  return CheckArgument("scale", scale, {ffi::F32}, {CeilDiv(rows, kBlock), CeilDiv(cols, kBlock)});
}

Status Run(ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::AnyBuffer scale, int64_t pool_id,
           std::string_view codec_name, ffi::AnyBuffer out) {
  const auto pool = Pools().Find(pool_id);
  if (!pool.ok()) return pool.error();
  const auto codec = FindCodec(codec_name);
  if (!codec.ok()) return codec.error();

  if (Status s = CheckArgument("x", x, {ffi::BF16}, {kAnySize, kAnySize}); !s.ok()) return s;
  const int64_t tokens = x.dimensions()[0], cols = x.dimensions()[1];
  if (Status s = CheckWeight(codec.value(), weight, cols); !s.ok()) return s;
  const int64_t rows = weight.dimensions()[0];
  if (Status s = CheckScale(codec.value(), scale, rows, cols); !s.ok()) return s;
  if (Status s = CheckArgument("result", out, {ffi::F32}, {tokens, rows}); !s.ok()) return s;

  const Matrix matrix{DataOf<const uint8_t>(weight), DataOf<const uint8_t>(scale), rows, cols};
  Linear(*pool.value()->pool, pool.value()->isa.For(codec.value().id), matrix, codec.value().bytes_per_weight,
         DataOf<const uint16_t>(x), tokens, DataOf<float>(out));
  return {};
}

ffi::Error Handle(ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::AnyBuffer scale, int64_t pool,
                  std::string_view codec, ffi::Result<ffi::AnyBuffer> out) {
  return ToXla(Run(x, weight, scale, pool, codec, *out));
}

XLA_FFI_DEFINE_HANDLER(kHandler, Handle,
                       ffi::Ffi::Bind()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Attr<int64_t>("pool")
                           .Attr<std::string_view>("codec")
                           .Ret<ffi::AnyBuffer>());

}  // namespace

XLA_FFI_Handler* const kLinearHandler = kHandler;

}  // namespace hmoe
