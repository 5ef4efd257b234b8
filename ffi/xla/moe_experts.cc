// Adapter: XLA buffers to hmoe::MoeExperts.

#include "kernels/moe_experts.h"

#include <utility>

#include "kernels/moe_experts_gpu.h"
#include "store/registry.h"
#include "xla/arguments.h"
#include "xla/handlers.h"

namespace hmoe {
namespace {

// `run` gets the store and operands that fit it, wherever they lie.
Status Checked(ffi::AnyBuffer hidden, ffi::AnyBuffer ids, ffi::AnyBuffer weights, ffi::AnyBuffer layer,
               int64_t store_id, ffi::AnyBuffer out, auto run) {
  const auto store = Stores().Find(store_id);
  if (!store.ok()) return store.error();
  const int64_t width = store.value()->shape().hidden;

  if (Status s = CheckArgument("hidden", hidden, {ffi::BF16}, {kAnySize, width}); !s.ok()) return s;
  const int64_t tokens = hidden.dimensions()[0];
  if (Status s = CheckArgument("ids", ids, {ffi::S32}, {tokens, kAnySize}); !s.ok()) return s;
  const int64_t slots = ids.dimensions()[1];
  if (Status s = CheckArgument("weights", weights, {ffi::F32}, {tokens, slots}); !s.ok()) return s;
  if (Status s = CheckArgument("layer", layer, {ffi::S32}, {}); !s.ok()) return s;
  if (Status s = CheckArgument("result", out, {ffi::F32}, {tokens, width}); !s.ok()) return s;

  const Routing routing{DataOf<const int32_t>(ids), DataOf<const float>(weights), tokens, slots};
  return run(*store.value(), GpuOperands{DataOf<const int32_t>(layer), DataOf<const uint16_t>(hidden),
                                         routing, DataOf<float>(out)});
}

ffi::Error Handle(ffi::AnyBuffer hidden, ffi::AnyBuffer ids, ffi::AnyBuffer weights, ffi::AnyBuffer layer,
                  int64_t store, ffi::Result<ffi::AnyBuffer> out) {
  return ToXla(
      Checked(hidden, ids, weights, layer, store, *out, [](ExpertStore& experts, const auto& operands) {
        return MoeExperts(experts, *operands.layer, operands.hidden, operands.routing, operands.out);
      }));
}

Status RunForGpu(ExpertStore& experts, const GpuOperands& operands, void* stream) {
  static const auto driver = GpuDriver::Open();
  if (!driver.ok()) return driver.error();
  static GpuMoeExperts& calls =
      *new GpuMoeExperts(driver.value());  // the driver may end before the process does
  return calls.Run(experts, operands, stream);
}

ffi::Error HandleForGpu(void* stream, ffi::AnyBuffer hidden, ffi::AnyBuffer ids, ffi::AnyBuffer weights,
                        ffi::AnyBuffer layer, int64_t store, ffi::Result<ffi::AnyBuffer> out) {
  return ToXla(Checked(
      hidden, ids, weights, layer, store, *out,
      [&](ExpertStore& experts, const auto& operands) { return RunForGpu(experts, operands, stream); }));
}

auto WithOperands(auto binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Attr<int64_t>("store")
      .template Ret<ffi::AnyBuffer>();
}

XLA_FFI_DEFINE_HANDLER(kHandler, Handle, WithOperands(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER(kGpuHandler, HandleForGpu,
                       WithOperands(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>()));

}  // namespace

XLA_FFI_Handler* const kMoeExpertsHandler = kHandler;
XLA_FFI_Handler* const kMoeExpertsGpuHandler = kGpuHandler;

}  // namespace hmoe
