// What the kernels are measured against: every weight to FP32 first, then multiply.
#pragma once

#include <cstdint>

#include "base/result.h"
#include "kernels/routing.h"
#include "store/expert_store.h"

namespace hmoe {

// The routed experts of one layer in codec fp8_block, in plain C++ that the compiler vectorises for the
// widest vectors of this machine: a row is looked up and scaled into a buffer of floats once, then multiplied
// with every token of its expert. The same threads, tasks and grouping as MoeExperts; hidden and out [tokens,
// hidden] are floats. For benchmarks only.
Status NaiveExperts(ExpertStore& store, int64_t layer, const float* hidden, const Routing& routing,
                    float* out);

}  // namespace hmoe
