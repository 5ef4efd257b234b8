// Adapter: XLA buffers to hmoe::ExpertLane.

#include "kernels/expert_lane.h"

#include "store/registry.h"
#include "xla/arguments.h"
#include "xla/handlers.h"

namespace hmoe {
namespace {

Status Submit(ffi::AnyBuffer hidden, ffi::AnyBuffer ids, ffi::AnyBuffer weights, ffi::AnyBuffer layer,
              ffi::AnyBuffer after, int64_t lane_id, int64_t slot, ffi::AnyBuffer ticket) {
  const auto lane = Lanes().Find(lane_id);
  if (!lane.ok()) return lane.error();
  const int64_t width = lane.value()->store()->shape().hidden;

  if (Status s = CheckArgument("hidden", hidden, {ffi::BF16}, {kAnySize, width}); !s.ok()) return s;
  const int64_t tokens = hidden.dimensions()[0];
  if (Status s = CheckArgument("ids", ids, {ffi::S32}, {tokens, kAnySize}); !s.ok()) return s;
  const int64_t choices = ids.dimensions()[1];
  if (Status s = CheckArgument("weights", weights, {ffi::F32}, {tokens, choices}); !s.ok()) return s;
  if (Status s = CheckArgument("layer", layer, {ffi::S32}, {}); !s.ok()) return s;
  if (Status s = CheckArgument("after", after, {ffi::S32}, {}); !s.ok()) return s;
  if (Status s = CheckArgument("result", ticket, {ffi::S32}, {}); !s.ok()) return s;

  const Routing routing{DataOf<const int32_t>(ids), DataOf<const float>(weights), tokens, choices};
  const auto submitted =
      lane.value()->Submit(slot, *DataOf<const int32_t>(layer), DataOf<const uint16_t>(hidden), routing);
  if (!submitted.ok()) return submitted.error();
  *DataOf<int32_t>(ticket) = submitted.value();
  return {};
}

Status Wait(ffi::AnyBuffer ticket, ffi::AnyBuffer after, int64_t lane_id, int64_t slot, ffi::AnyBuffer out) {
  const auto lane = Lanes().Find(lane_id);
  if (!lane.ok()) return lane.error();
  const int64_t width = lane.value()->store()->shape().hidden;
  if (Status s = CheckArgument("ticket", ticket, {ffi::S32}, {}); !s.ok()) return s;
  if (Status s = CheckArgument("after", after, {ffi::S32}, {}); !s.ok()) return s;
  if (Status s = CheckArgument("result", out, {ffi::F32}, {kAnySize, width}); !s.ok()) return s;
  return lane.value()->Wait(slot, *DataOf<const int32_t>(ticket), out.dimensions()[0], DataOf<float>(out));
}

ffi::Error HandleSubmit(ffi::AnyBuffer hidden, ffi::AnyBuffer ids, ffi::AnyBuffer weights,
                        ffi::AnyBuffer layer, ffi::AnyBuffer after, int64_t lane, int64_t slot,
                        ffi::Result<ffi::AnyBuffer> ticket) {
  return ToXla(Submit(hidden, ids, weights, layer, after, lane, slot, *ticket));
}

ffi::Error HandleWait(ffi::AnyBuffer ticket, ffi::AnyBuffer after, int64_t lane, int64_t slot,
                      ffi::Result<ffi::AnyBuffer> out) {
  return ToXla(Wait(ticket, after, lane, slot, *out));
}

XLA_FFI_DEFINE_HANDLER(kSubmit, HandleSubmit,
                       ffi::Ffi::Bind()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Attr<int64_t>("lane")
                           .Attr<int64_t>("slot")
                           .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER(kWait, HandleWait,
                       ffi::Ffi::Bind()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Attr<int64_t>("lane")
                           .Attr<int64_t>("slot")
                           .Ret<ffi::AnyBuffer>());

}  // namespace

XLA_FFI_Handler* const kExpertsSubmitHandler = kSubmit;
XLA_FFI_Handler* const kExpertsWaitHandler = kWait;

}  // namespace hmoe
