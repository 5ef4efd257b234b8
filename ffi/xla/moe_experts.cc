// Adapter: XLA buffers to hmoe::MoeExperts.

#include "kernels/moe_experts.h"

#include "store/registry.h"
#include "xla/arguments.h"
#include "xla/handlers.h"

namespace hmoe {
namespace {

Status Run(ffi::AnyBuffer hidden, ffi::AnyBuffer ids, ffi::AnyBuffer weights, ffi::AnyBuffer layer,
           int64_t store_id, ffi::AnyBuffer out) {
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
  return MoeExperts(*store.value(), *DataOf<const int32_t>(layer), DataOf<const uint16_t>(hidden), routing,
                    DataOf<float>(out));
}

ffi::Error Handle(ffi::AnyBuffer hidden, ffi::AnyBuffer ids, ffi::AnyBuffer weights, ffi::AnyBuffer layer,
                  int64_t store, ffi::Result<ffi::AnyBuffer> out) {
  return ToXla(Run(hidden, ids, weights, layer, store, *out));
}

XLA_FFI_DEFINE_HANDLER(kHandler, Handle,
                       ffi::Ffi::Bind()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Attr<int64_t>("store")
                           .Ret<ffi::AnyBuffer>());

}  // namespace

XLA_FFI_Handler* const kMoeExpertsHandler = kHandler;

}  // namespace hmoe
