#include "kernels/moe_experts.h"

#include <algorithm>
#include <thread>

#include "tests/check.h"
#include "tests/random_experts.h"

namespace hmoe {
namespace {

using test::Batch;
using test::Experts;

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
  const Batch batch(test::ShapeFor(codec), 1);
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
