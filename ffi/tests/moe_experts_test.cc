#include "kernels/moe_experts.h"

#include <algorithm>
#include <thread>

#include "tests/check.h"
#include "tests/random_matrix.h"

namespace hmoe {
namespace {

constexpr int64_t kExperts = 5;

// Both widths as ragged as the codec lets them be.
StoreShape ShapeFor(const Codec& codec) {
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
  std::vector<test::RandomMatrix> matrices;
  std::vector<std::vector<uint8_t>> weights, scales;
};

struct Batch {
  Batch(const StoreShape& shape, int64_t num_tokens) : width(shape.hidden), tokens(num_tokens) {
    std::mt19937 random(5);
    hidden = test::RandomActivations(tokens * width, random);
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

void TestThreadsAndBatchesDoNotChangeBits(const Codec& codec, const std::string& isa) {
  const Experts experts(codec);
  const Batch batch(experts.shape, 19);
  const auto whole = batch.Run(*experts.Store(codec, isa, 1), 0, batch.tokens);
  for (const int threads : {2, 3}) {
    const auto store = experts.Store(codec, isa, threads);
    CHECK(batch.Run(*store, 0, batch.tokens) == whole);
    for (int64_t t = 0; t < batch.tokens; ++t) {
      const auto alone = batch.Run(*store, t, t + 1);
      CHECK(std::equal(alone.begin(), alone.end(), whole.begin() + t * batch.width));
    }
  }
}

// One expert has more tokens than a kernel takes at once, another fewer; on one node and on two.
void TestAnExpertOfManyTokensGivesEachItsBits(const Codec& codec, const std::string& isa) {
  const Experts experts(codec);
  Batch batch(experts.shape, 300);
  for (int64_t t = 0; t < batch.tokens; ++t) {
    for (int64_t slot = 0; slot < Batch::kSlots; ++slot)
      batch.ids[static_cast<size_t>(t * Batch::kSlots + slot)] = slot == 0 ? 2 : t < 40 ? 3 : kNoExpert;
  }
  const auto store = experts.Store(codec, isa, 2);
  const auto whole = batch.Run(*store, 0, batch.tokens);
  CHECK(batch.Run(*experts.Store(codec, isa, 2, FindTopology("0;1").value()), 0, batch.tokens) == whole);
  for (int64_t t = 0; t < batch.tokens; t += 23) {
    const auto alone = batch.Run(*store, t, t + 1);
    CHECK(std::equal(alone.begin(), alone.end(), whole.begin() + t * batch.width));
  }
}

void TestCallersAtOnceGetTheirOwnResults() {
  const Codec codec = FindCodec("fp8_block").value();
  const Experts experts(codec);
  const auto store = experts.Store(codec, OfferedIsaNames().front(), 2);
  const Batch batch(experts.shape, 4);
  const auto expected = batch.Run(*store, 0, 4);
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&] {
      for (int round = 0; round < 20; ++round) CHECK(batch.Run(*store, 0, 4) == expected);
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK_EQ(store->stats().calls, 61);
}

void TestErrorsAreSentences() {
  const Codec codec = FindCodec("bf16").value();
  const auto store = Experts(codec).Store(codec, "scalar", 1);
  const Batch batch(ShapeFor(codec), 1);
  std::vector<float> out(static_cast<size_t>(batch.width));
  const int32_t bad_id[] = {5};
  const float weight[] = {1};
  CHECK_EQ(MoeExperts(*store, 1, batch.hidden.data(), {bad_id, weight, 1, 1}, out.data()).error().message,
           "layer: expected 0 <= layer < 1, got 1");
  CHECK_CONTAINS(
      MoeExperts(*store, 0, batch.hidden.data(), {bad_id, weight, 1, 1}, out.data()).error().message,
      "names expert 5");
  store->Close(Fail("expert store 7 is closed"));
  CHECK_CONTAINS(
      MoeExperts(*store, 0, batch.hidden.data(), {bad_id, weight, 1, 1}, out.data()).error().message,
      "expert store 7 is closed");
}

}  // namespace
}  // namespace hmoe

int main() {
  for (const hmoe::Codec& codec : hmoe::AllCodecs()) {
    for (const std::string& isa : hmoe::OfferedIsaNames()) {
      hmoe::TestThreadsAndBatchesDoNotChangeBits(codec, isa);
      hmoe::TestAnExpertOfManyTokensGivesEachItsBits(codec, isa);
    }
  }
  hmoe::TestCallersAtOnceGetTheirOwnResults();
  hmoe::TestErrorsAreSentences();
  return hmoe::test::failures;
}
