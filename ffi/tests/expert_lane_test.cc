#include "kernels/expert_lane.h"

#include <future>

#include "tests/random_experts.h"

namespace hmoe {
namespace {

using std::chrono::milliseconds;
using test::Batch;
using test::Experts;

Routing RoutingOf(const Batch& batch) {
  return {batch.ids.data(), batch.weights.data(), batch.tokens, Batch::kSlots};
}

struct Case {
  explicit Case(int num_slots, milliseconds patience = milliseconds(60'000))
      : store(experts.Store(codec, OfferedIsaNames().front(), 2)),
        lane(ExpertLane::Create(store, num_slots, patience).value()) {}

  int32_t Submit(int64_t slot, const Batch& batch) {
    return lane->Submit(slot, 0, batch.hidden.data(), RoutingOf(batch)).value();
  }
  std::vector<float> Wait(int64_t slot, int32_t ticket, const Batch& batch) {
    std::vector<float> out(static_cast<size_t>(batch.tokens * batch.width), -1.0f);
    CHECK(lane->Wait(slot, ticket, batch.tokens, out.data()).ok());
    return out;
  }

  Codec codec = FindCodec("fp8_block").value();
  Experts experts{codec};
  std::shared_ptr<ExpertStore> store;
  std::shared_ptr<ExpertLane> lane;
};

void TestResultsAreThoseOfTheCall() {
  Case c(2);
  const Batch small(c.experts.shape, 1), large(c.experts.shape, 7), none(c.experts.shape, 0);
  const auto expect_small = small.Run(*c.store, 0, 1), expect_large = large.Run(*c.store, 0, 7);
  for (int round = 0; round < 50; ++round) {
    const int32_t first = c.Submit(0, large), second = c.Submit(1, small);
    CHECK(c.Wait(0, first, large) == expect_large);
    const int32_t third = c.Submit(0, small);
    CHECK(c.Wait(1, second, small) == expect_small);
    CHECK(c.Wait(0, third, small) == expect_small);
    CHECK(c.Wait(0, third, small) == expect_small);  // it stays until the slot's next job
  }
  CHECK(c.Wait(0, c.Submit(0, none), none).empty());

  // Of each job one record, though some were fetched twice.
  const std::vector<JobTimes> jobs = c.lane->Jobs();
  CHECK_EQ(jobs.size(), size_t{3 * 50 + 1});
  int64_t computed = 0, waited = 0;
  for (const JobTimes& job : jobs) {
    CHECK(0 < job.submitted && job.submitted <= job.begun && job.begun <= job.done &&
          job.done <= job.fetched);
    CHECK(job.submitted <= job.awaited && job.awaited <= job.fetched);
    computed += job.done - job.begun;
    waited += job.fetched - job.awaited;
  }
  CHECK_EQ(jobs[1].slot, 1);
  CHECK_EQ(c.lane->busy().count(), computed);
  CHECK_EQ(c.lane->waited().count(), waited);
}

void TestTheLastJobsAreKept() {
  Case c(1);
  const Batch none(c.experts.shape, 0);
  const int32_t first = c.Submit(0, none);
  c.Wait(0, first, none);
  const int64_t earliest = c.lane->Jobs().front().submitted;
  for (size_t i = 0; i < ExpertLane::kKeptJobs; ++i) c.Wait(0, c.Submit(0, none), none);
  const std::vector<JobTimes> jobs = c.lane->Jobs();
  CHECK_EQ(jobs.size(), ExpertLane::kKeptJobs);
  CHECK(jobs.front().submitted > earliest);
  for (size_t i = 1; i < jobs.size(); ++i) CHECK(jobs[i - 1].fetched <= jobs[i].submitted);
}

void TestTheOperandsAreCopied() {
  Case c(1);
  Batch batch(c.experts.shape, 5);
  const auto expected = batch.Run(*c.store, 0, 5);
  const int32_t ticket = c.Submit(0, batch);
  std::fill(batch.hidden.begin(), batch.hidden.end(), uint16_t{0});
  std::fill(batch.ids.begin(), batch.ids.end(), kNoExpert);
  CHECK(c.Wait(0, ticket, batch) == expected);
}

void TestAJobThatNobodyAwaitsHoldsNobodyUp() {
  Case c(2);
  const Batch batch(c.experts.shape, 5);
  const auto expected = batch.Run(*c.store, 0, 5);
  for (int i = 0; i < 20; ++i) (void)c.Submit(i % 2, batch);
  CHECK(c.Wait(0, c.Submit(0, batch), batch) == expected);
  (void)c.Submit(0, batch);  // the lane ends with this one under way
}

void TestThreadsUseSlotsOfTheirOwn() {
  Case c(3);
  const Batch batch(c.experts.shape, 3);
  const auto expected = batch.Run(*c.store, 0, 3);
  std::vector<std::thread> threads;
  for (int slot = 0; slot < 3; ++slot) {
    threads.emplace_back([&, slot] {
      for (int round = 0; round < 40; ++round) CHECK(c.Wait(slot, c.Submit(slot, batch), batch) == expected);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void TestAJobThatIsLostIsAnErrorAndNotAHang() {
  Case c(1, milliseconds(100));
  const Batch batch(c.experts.shape, 2);
  std::promise<void> begun, end;
  // Somebody else has the pool, and does not let go.
  std::thread blocker([&] {
    const ThreadPool::Session session(c.store->pool());
    begun.set_value();
    end.get_future().wait();
  });
  begun.get_future().wait();
  const int32_t ticket = c.Submit(0, batch);
  std::vector<float> out(static_cast<size_t>(batch.tokens * batch.width));
  const std::string late = "the routed experts of layer 0 are not done after 100 ms";
  CHECK_EQ(c.lane->Wait(0, ticket, 2, out.data()).error().message, late);
  const auto lost = std::chrono::steady_clock::now();
  for (int again = 0; again < 100; ++again) {
    CHECK_EQ(c.lane->Submit(0, 0, batch.hidden.data(), RoutingOf(batch)).error().message, late);
  }
  CHECK(std::chrono::steady_clock::now() - lost < 20 * milliseconds(100));  // not a hundred times
  end.set_value();
  blocker.join();
  while (!c.lane->IsDone(0, ticket).value()) std::this_thread::yield();
  CHECK(c.Wait(0, ticket, batch) == batch.Run(*c.store, 0, 2));
}

void TestErrorsAreSentences() {
  Case c(2);
  const Batch batch(c.experts.shape, 2);
  std::vector<float> out(static_cast<size_t>(batch.tokens * batch.width));
  const auto submit = [&](int64_t slot, int64_t layer) {
    return c.lane->Submit(slot, layer, batch.hidden.data(), RoutingOf(batch));
  };
  const auto wait = [&](int64_t slot, int32_t ticket, int64_t tokens) {
    return c.lane->Wait(slot, ticket, tokens, out.data()).error().message;
  };
  CHECK_EQ(ExpertLane::Create(c.store, 0, milliseconds(1)).error().message,
           "num_slots: expected at least 1, got 0");
  CHECK_EQ(submit(2, 0).error().message, "slot: expected 0 to 1, got 2");
  CHECK_EQ(submit(-1, 0).error().message, "slot: expected 0 to 1, got -1");
  const int32_t wrong_layer = submit(0, 1).value();
  CHECK_EQ(wait(0, wrong_layer, 2), "layer: expected 0 <= layer < 1, got 1");
  CHECK_EQ(wait(0, wrong_layer + 1, 2), "ticket 2 of slot 0: its job is 1");
  CHECK_EQ(wait(0, wrong_layer, 3), "slot 0: 2 tokens were submitted, 3 are awaited");
  c.store->Close(Fail("expert store 7 is closed"));
  CHECK_EQ(wait(1, submit(1, 0).value(), 2), "expert store 7 is closed");
}

}  // namespace
}  // namespace hmoe

int main() {
  hmoe::TestResultsAreThoseOfTheCall();
  hmoe::TestTheLastJobsAreKept();
  hmoe::TestTheOperandsAreCopied();
  hmoe::TestAJobThatNobodyAwaitsHoldsNobodyUp();
  hmoe::TestThreadsUseSlotsOfTheirOwn();
  hmoe::TestAJobThatIsLostIsAnErrorAndNotAHang();
  hmoe::TestErrorsAreSentences();
  return hmoe::test::failures;
}
