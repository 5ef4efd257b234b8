#include "xla/expert_operands.h"

namespace hmoe {

Result<ExpertOperands> ReadExpertOperands(const ffi::AnyBuffer& hidden, const ffi::AnyBuffer& ids,
                                          const ffi::AnyBuffer& weights, const ffi::AnyBuffer& layer,
                                          int64_t width) {
  if (Status s = CheckArgument("hidden", hidden, {ffi::BF16}, {kAnySize, width}); !s.ok()) return s.error();
  const int64_t tokens = hidden.dimensions()[0];
  if (Status s = CheckArgument("ids", ids, {ffi::S32}, {tokens, kAnySize}); !s.ok()) return s.error();
  const int64_t choices = ids.dimensions()[1];
  if (Status s = CheckArgument("weights", weights, {ffi::F32}, {tokens, choices}); !s.ok()) return s.error();
  if (Status s = CheckArgument("layer", layer, {ffi::S32}, {}); !s.ok()) return s.error();
  const Routing routing{DataOf<const int32_t>(ids), DataOf<const float>(weights), tokens, choices};
  return ExpertOperands{DataOf<const int32_t>(layer), DataOf<const uint16_t>(hidden), routing, nullptr};
}

}  // namespace hmoe
