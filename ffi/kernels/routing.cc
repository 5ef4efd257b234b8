#include "kernels/routing.h"

#include <algorithm>

namespace hmoe {

Status CheckRouting(const Routing& routing, int64_t num_experts) {
  for (int64_t i = 0; i < routing.tokens * routing.slots; ++i) {
    const int32_t id = routing.ids[i];
    if (id >= kNoExpert && id < num_experts) continue;
    return Fail("ids: token ", i / routing.slots, ", slot ", i % routing.slots, " names expert ", id,
                ": expected 0 <= id < ", num_experts, ", or ", kNoExpert, " for no expert");
  }
  return {};
}

Groups GroupByExpert(const Routing& routing, int64_t num_experts, Scratch& scratch) {
  const int64_t choices = routing.tokens * routing.slots;
  int64_t* ends = scratch.Take<int64_t>(num_experts);
  std::fill_n(ends, num_experts, 0);
  for (int64_t i = 0; i < choices; ++i) {
    if (routing.ids[i] != kNoExpert) ++ends[routing.ids[i]];
  }

  auto* experts = scratch.Take<ActiveExpert>(std::min(num_experts, choices));
  int64_t num_active = 0, num_pairs = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const int64_t count = ends[expert];
    ends[expert] = num_pairs;
    if (count > 0) experts[num_active++] = {expert, num_pairs, num_pairs + count};
    num_pairs += count;
  }

  auto* pairs = scratch.Take<Pair>(num_pairs);
  for (int64_t i = 0; i < choices; ++i) {
    if (routing.ids[i] == kNoExpert) continue;
    pairs[ends[routing.ids[i]]++] = {i / routing.slots, routing.weights[i]};
  }
  return {{pairs, static_cast<size_t>(num_pairs)}, {experts, static_cast<size_t>(num_active)}};
}

}  // namespace hmoe
