// Which tokens every expert has: the router's choice, turned around.
#pragma once

#include <cstdint>
#include <span>

#include "base/result.h"
#include "base/scratch.h"

namespace hmoe {

// The router's choice for one layer, [tokens, slots]. An id of kNoExpert marks an unused slot.
inline constexpr int32_t kNoExpert = -1;
struct Routing {
  const int32_t* ids;
  const float* weights;
  int64_t tokens;
  int64_t slots;
};

// The operands of MoeExperts, and where the result goes: all in the memory of the CPU, or all in a GPU's.
struct ExpertOperands {
  const int32_t* layer;
  const uint16_t* hidden;
  Routing routing;
  float* out;
};

struct Pair {
  int64_t token;
  float weight;
};

struct ActiveExpert {
  int64_t expert;
  int64_t begin, end;  // its pairs
};

// Pairs sorted by expert, then token, then slot; experts ascending. The sum of a token's experts follows this
// order, whatever else is in the batch.
struct Groups {
  std::span<const Pair> pairs;
  std::span<const ActiveExpert> experts;
};

Status CheckRouting(const Routing& routing, int64_t num_experts);

// The result lives in `scratch`. The routing has been checked.
Groups GroupByExpert(const Routing& routing, int64_t num_experts, Scratch& scratch);

}  // namespace hmoe
