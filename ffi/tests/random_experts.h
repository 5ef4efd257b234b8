// A store of a few random experts, and tokens that choose among them.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/moe_experts.h"
#include "tests/check.h"
#include "tests/random_matrix.h"

namespace hmoe::test {

inline constexpr int64_t kExperts = 5;

// Both widths as ragged as the codec lets them be.
inline StoreShape ShapeFor(const Codec& codec) {
  return {1, kExperts, RoundUp(200, codec.column_multiple), RoundUp(139, codec.column_multiple)};
}

struct Experts {
  explicit Experts(const Codec& codec) : shape(ShapeFor(codec)) {
    std::mt19937 random(3);
    for (int64_t e = 0; e < shape.experts; ++e) {
      matrices.push_back({codec, shape.ffn, shape.hidden, random});
      matrices.push_back({codec, shape.ffn, shape.hidden, random});
      matrices.push_back({codec, shape.hidden, shape.ffn, random});
    }
    for (const auto& m : matrices) {
      weights.push_back(m.weights());
      scales.push_back(m.scales());
    }
  }

  std::shared_ptr<ExpertStore> Store(const Codec& codec, const std::string& isa, int threads,
                                     const Topology& topology = DetectTopology()) const {
    auto compute = Compute::Create(threads, isa, topology).value();
    auto store = ExpertStore::Create(compute, codec, shape).value();
    for (size_t i = 0; i < matrices.size(); ++i) {
      const auto expert = static_cast<int64_t>(i) / kNumMatrices;
      CHECK(store
                ->Add(0, expert, static_cast<MatrixName>(i % kNumMatrices), weights[i], scales[i],
                      matrices[i].scale_type())
                .ok());
    }
    CHECK(store->Freeze().ok());
    return store;
  }

  StoreShape shape;
  std::vector<RandomMatrix> matrices;
  std::vector<std::vector<uint8_t>> weights, scales;
};

struct Batch {
  Batch(const StoreShape& shape, int64_t num_tokens) : width(shape.hidden), tokens(num_tokens) {
    std::mt19937 random(5);
    hidden = RandomActivations(tokens * width, random);
    for (int64_t i = 0; i < tokens * kSlots; ++i) {
      ids.push_back(static_cast<int32_t>(random() % static_cast<unsigned>(kExperts + 1)) - 1);
      weights.push_back(static_cast<float>(random() % 100) / 100);
    }
  }

  std::vector<float> Run(ExpertStore& store, int64_t begin, int64_t end) const {
    std::vector<float> out(static_cast<size_t>((end - begin) * width), -1.0f);
    const Routing routing{&ids[static_cast<size_t>(begin * kSlots)],
                          &weights[static_cast<size_t>(begin * kSlots)], end - begin, kSlots};
    CHECK(MoeExperts(store, 0, &hidden[static_cast<size_t>(begin * width)], routing, out.data()).ok());
    return out;
  }

  static constexpr int64_t kSlots = 3;
  int64_t width, tokens;
  std::vector<uint16_t> hidden;
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

}  // namespace hmoe::test
