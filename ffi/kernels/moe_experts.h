// The routed experts of one layer: down(silu(gate x) * up x) for the experts of every token, weighted and
// summed.
#pragma once

#include <cstdint>

#include "base/result.h"
#include "kernels/routing.h"
#include "store/expert_store.h"

namespace hmoe {

// hidden [tokens, hidden] in bfloat16, out [tokens, hidden]. The intermediate is rounded to bfloat16. The
// bits of a token's row depend on its own activations and routing and on the ISA, on nothing else.
Status MoeExperts(ExpertStore& store, int64_t layer, const uint16_t* hidden, const Routing& routing,
                  float* out);

}  // namespace hmoe
