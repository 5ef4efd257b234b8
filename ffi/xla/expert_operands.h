// The operands of routed experts as XLA hands them over.
#pragma once

#include "base/result.h"
#include "kernels/routing.h"
#include "xla/arguments.h"

namespace hmoe {

// hidden [t, width] bf16, ids [t, k] s32, weights [t, k] f32, layer [] s32, wherever they lie. The result is
// not among them.
Result<ExpertOperands> ReadExpertOperands(const ffi::AnyBuffer& hidden, const ffi::AnyBuffer& ids,
                                          const ffi::AnyBuffer& weights, const ffi::AnyBuffer& layer,
                                          int64_t width);

}  // namespace hmoe
