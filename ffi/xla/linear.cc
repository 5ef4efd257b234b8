// Adapter: XLA buffers to hmoe::Linear.

#include "kernels/linear.h"

#include <span>
#include <string_view>

#include "store/registry.h"
#include "xla/arguments.h"
#include "xla/handlers.h"

namespace hmoe {
namespace {

// The dtypes in which a checkpoint's array of this codec may come.
std::initializer_list<ffi::DataType> WeightTypes(CodecId id) {
  static constexpr std::initializer_list<ffi::DataType> kBf16 = {ffi::BF16}, kFp8 = {ffi::F8E4M3FN, ffi::U8},
                                                        kInt8 = {ffi::S8}, kWords = {ffi::S32, ffi::U8},
                                                        kBytes = {ffi::U8};
  switch (id) {
    case CodecId::kBf16:
      return kBf16;
    case CodecId::kFp8Block:
    case CodecId::kFp8Channel:
      return kFp8;
    case CodecId::kInt8Channel:
      return kInt8;
    case CodecId::kMxfp4:
      return kBytes;
    default:
      return kWords;
  }
}

Result<ScaleType> TypeOfScales(const ffi::AnyBuffer& scale) {
  switch (scale.element_type()) {
    case ffi::DataType::F32:
      return ScaleType::kFloat32;
    case ffi::DataType::BF16:
      return ScaleType::kBf16;
    case ffi::DataType::U8:
      return ScaleType::kE8M0;
    default:
      return CheckArgument("scale", scale, {ffi::F32, ffi::BF16, ffi::U8}, {}).error();
  }
}

std::span<const uint8_t> BytesOf(const ffi::AnyBuffer& buffer) {
  return {DataOf<const uint8_t>(buffer), buffer.size_bytes()};
}

Status Run(ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::AnyBuffer scale, int64_t pool_id,
           std::string_view codec_name, ffi::AnyBuffer out) {
  const auto pool = Pools().Find(pool_id);
  if (!pool.ok()) return pool.error();
  const auto codec = FindCodec(codec_name);
  if (!codec.ok()) return codec.error();

  if (Status s = CheckArgument("x", x, {ffi::BF16}, {kAnySize, kAnySize}); !s.ok()) return s;
  const int64_t tokens = x.dimensions()[0], cols = x.dimensions()[1];
  if (Status s = CheckArgument("weight", weight, WeightTypes(codec.value().id), {kAnySize, kAnySize});
      !s.ok()) {
    return s;
  }
  const int64_t rows = weight.dimensions()[0];
  const auto scale_type = TypeOfScales(scale);
  if (!scale_type.ok()) return scale_type.error();
  const auto matrix = codec.value().Describe(rows, cols, BytesOf(weight), BytesOf(scale), scale_type.value());
  if (!matrix.ok()) return Fail("weight and scale: ", matrix.error().message);
  if (Status s = CheckArgument("result", out, {ffi::F32}, {tokens, rows}); !s.ok()) return s;

  Linear(*pool.value()->pool, pool.value()->isa, codec.value(), matrix.value(), DataOf<const uint16_t>(x),
         tokens, DataOf<float>(out));
  return {};
}

ffi::Error Handle(ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::AnyBuffer scale, int64_t pool,
                  std::string_view codec, ffi::Result<ffi::AnyBuffer> out) {
  return ToXla(Run(x, weight, scale, pool, codec, *out));
}

XLA_FFI_DEFINE_HANDLER(kHandler, Handle,
                       WithArguments<3>(ffi::Ffi::Bind())
                           .Attr<int64_t>("pool")
                           .Attr<std::string_view>("codec")
                           .Ret<ffi::AnyBuffer>());

}  // namespace

XLA_FFI_Handler* const kLinearHandler = kHandler;

}  // namespace hmoe
