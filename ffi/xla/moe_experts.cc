// Adapter: XLA buffers to hmoe::MoeExperts.

#include "kernels/moe_experts.h"

#include <utility>

#include "kernels/moe_experts_gpu.h"
#include "store/registry.h"
#include "xla/expert_operands.h"
#include "xla/handlers.h"

namespace hmoe {
namespace {

// `run` gets the store and operands that fit it, wherever they lie.
Status Checked(ffi::AnyBuffer hidden, ffi::AnyBuffer ids, ffi::AnyBuffer weights, ffi::AnyBuffer layer,
               int64_t store_id, ffi::AnyBuffer out, auto run) {
  const auto store = Stores().Find(store_id);
  if (!store.ok()) return store.error();
  const int64_t width = store.value()->shape().hidden;

  auto operands = ReadExpertOperands(hidden, ids, weights, layer, width);
  if (!operands.ok()) return operands.error();
  const int64_t tokens = operands.value().routing.tokens;
  if (Status s = CheckArgument("result", out, {ffi::F32}, {tokens, width}); !s.ok()) return s;
  operands.value().out = DataOf<float>(out);
  return run(*store.value(), operands.value());
}

ffi::Error Handle(ffi::AnyBuffer hidden, ffi::AnyBuffer ids, ffi::AnyBuffer weights, ffi::AnyBuffer layer,
                  int64_t store, ffi::Result<ffi::AnyBuffer> out) {
  return ToXla(
      Checked(hidden, ids, weights, layer, store, *out, [](ExpertStore& experts, const auto& operands) {
        return MoeExperts(experts, *operands.layer, operands.hidden, operands.routing, operands.out);
      }));
}

Status RunForGpu(ExpertStore& experts, const ExpertOperands& operands, void* stream) {
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
  return WithArguments<4>(std::move(binding)).template Attr<int64_t>("store").template Ret<ffi::AnyBuffer>();
}

XLA_FFI_DEFINE_HANDLER(kHandler, Handle, WithOperands(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER(kGpuHandler, HandleForGpu,
                       WithOperands(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>()));

}  // namespace

XLA_FFI_Handler* const kMoeExpertsHandler = kHandler;
XLA_FFI_Handler* const kMoeExpertsGpuHandler = kGpuHandler;

}  // namespace hmoe
