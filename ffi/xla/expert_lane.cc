// Adapter: XLA buffers to hmoe::ExpertLane, and to GpuExpertLane.

#include "kernels/expert_lane.h"

#include <utility>

#include "kernels/expert_lane_gpu.h"
#include "store/registry.h"
#include "xla/expert_operands.h"
#include "xla/handlers.h"

namespace hmoe {
namespace {

// `submit` gets the lane and operands that fit it, wherever they lie.
Status CheckedSubmit(ffi::AnyBuffer hidden, ffi::AnyBuffer ids, ffi::AnyBuffer weights, ffi::AnyBuffer layer,
                     ffi::AnyBuffer after, int64_t lane_id, ffi::AnyBuffer ticket, auto submit) {
  const auto lane = Lanes().Find(lane_id);
  if (!lane.ok()) return lane.error();
  const int64_t width = lane.value()->store()->shape().hidden;

  const auto operands = ReadExpertOperands(hidden, ids, weights, layer, width);
  if (!operands.ok()) return operands.error();
  if (Status s = CheckArgument("after", after, {ffi::S32}, {}); !s.ok()) return s;
  if (Status s = CheckArgument("result", ticket, {ffi::S32}, {}); !s.ok()) return s;
  return submit(lane.value(), operands.value());
}

Status CheckedWait(ffi::AnyBuffer ticket, ffi::AnyBuffer after, int64_t lane_id, ffi::AnyBuffer out,
                   auto wait) {
  const auto lane = Lanes().Find(lane_id);
  if (!lane.ok()) return lane.error();
  const int64_t width = lane.value()->store()->shape().hidden;
  if (Status s = CheckArgument("ticket", ticket, {ffi::S32}, {}); !s.ok()) return s;
  if (Status s = CheckArgument("after", after, {ffi::S32}, {}); !s.ok()) return s;
  if (Status s = CheckArgument("result", out, {ffi::F32}, {kAnySize, width}); !s.ok()) return s;
  return wait(lane.value());
}

ffi::Error Submit(ffi::AnyBuffer hidden, ffi::AnyBuffer ids, ffi::AnyBuffer weights, ffi::AnyBuffer layer,
                  ffi::AnyBuffer after, int64_t lane, int64_t slot, ffi::Result<ffi::AnyBuffer> ticket) {
  const auto submit = [&](const auto& to, const ExpertOperands& operands) -> Status {
    const auto submitted = to->Submit(slot, *operands.layer, operands.hidden, operands.routing);
    if (!submitted.ok()) return submitted.error();
    *DataOf<int32_t>(*ticket) = submitted.value();
    return {};
  };
  return ToXla(CheckedSubmit(hidden, ids, weights, layer, after, lane, *ticket, submit));
}

ffi::Error Wait(ffi::AnyBuffer ticket, ffi::AnyBuffer after, int64_t lane, int64_t slot,
                ffi::Result<ffi::AnyBuffer> out) {
  return ToXla(CheckedWait(ticket, after, lane, *out, [&](const auto& of) {
    return of->Wait(slot, *DataOf<const int32_t>(ticket), out->dimensions()[0], DataOf<float>(*out));
  }));
}

Result<GpuExpertLane*> ForGpu() {
  static const auto driver = GpuDriver::Open();
  if (!driver.ok()) return driver.error();
  static GpuExpertLane& lanes =
      *new GpuExpertLane(driver.value());  // the driver may end before the process does
  return &lanes;
}

ffi::Error SubmitForGpu(void* stream, ffi::AnyBuffer hidden, ffi::AnyBuffer ids, ffi::AnyBuffer weights,
                        ffi::AnyBuffer layer, ffi::AnyBuffer after, int64_t lane, int64_t slot,
                        ffi::Result<ffi::AnyBuffer> ticket) {
  const auto submit = [&](const auto& to, const ExpertOperands& operands) -> Status {
    const auto gpu = ForGpu();
    if (!gpu.ok()) return gpu.error();
    return gpu.value()->Submit(to, slot, operands, DataOf<int32_t>(*ticket), stream);
  };
  return ToXla(CheckedSubmit(hidden, ids, weights, layer, after, lane, *ticket, submit));
}

ffi::Error WaitForGpu(void* stream, ffi::AnyBuffer ticket, ffi::AnyBuffer after, int64_t lane, int64_t slot,
                      ffi::Result<ffi::AnyBuffer> out) {
  return ToXla(CheckedWait(ticket, after, lane, *out, [&](const auto& of) -> Status {
    const auto gpu = ForGpu();
    if (!gpu.ok()) return gpu.error();
    return gpu.value()->Wait(of, slot, DataOf<float>(*out), stream);
  }));
}

auto WithSubmitOperands(auto binding) {
  return WithArguments<5>(std::move(binding))
      .template Attr<int64_t>("lane")
      .template Attr<int64_t>("slot")
      .template Ret<ffi::AnyBuffer>();
}

auto WithWaitOperands(auto binding) {
  return WithArguments<2>(std::move(binding))
      .template Attr<int64_t>("lane")
      .template Attr<int64_t>("slot")
      .template Ret<ffi::AnyBuffer>();
}

auto OnStream() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>(); }

XLA_FFI_DEFINE_HANDLER(kSubmit, Submit, WithSubmitOperands(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER(kWait, Wait, WithWaitOperands(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER(kSubmitForGpu, SubmitForGpu, WithSubmitOperands(OnStream()));
XLA_FFI_DEFINE_HANDLER(kWaitForGpu, WaitForGpu, WithWaitOperands(OnStream()));

}  // namespace

XLA_FFI_Handler* const kExpertsSubmitHandler = kSubmit;
XLA_FFI_Handler* const kExpertsWaitHandler = kWait;
XLA_FFI_Handler* const kExpertsSubmitGpuHandler = kSubmitForGpu;
XLA_FFI_Handler* const kExpertsWaitGpuHandler = kWaitForGpu;

}  // namespace hmoe
