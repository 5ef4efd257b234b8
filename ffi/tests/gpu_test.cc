// Pinned memory, and experts for activations on a GPU, by a driver that stands in for the real one.

#include <dlfcn.h>

#include <cstring>
#include <future>
#include <string>
#include <thread>

#include "kernels/expert_lane_gpu.h"
#include "kernels/moe_experts_gpu.h"
#include "store/expert_store.h"
#include "tests/check.h"

namespace hmoe {
namespace {

constexpr StoreShape kShape{2, 3, 256, 128};  // hidden, then ffn
constexpr int kOutOfMemory = 2;

void* const library = dlopen(STAND_IN_DRIVER, RTLD_NOW);
const auto Calls = reinterpret_cast<const char* (*)()>(dlsym(library, "stand_in_calls"));
const auto FailNext = reinterpret_cast<void (*)(const char*, int, int)>(dlsym(library, "stand_in_fail"));
const auto RegisteredBytes = reinterpret_cast<int64_t (*)()>(dlsym(library, "stand_in_registered"));
const auto Contexts = reinterpret_cast<int (*)()>(dlsym(library, "stand_in_contexts"));

std::shared_ptr<const GpuDriver> OpenDriver() { return GpuDriver::Open(STAND_IN_DRIVER).value(); }

std::shared_ptr<ExpertStore> NewStore(Residency residency, StoreShape shape = kShape) {
  const auto store =
      ExpertStore::Create(Compute::Create(2, "scalar").value(), FindCodec("bf16").value(), shape, residency)
          .value();
  static std::vector<std::vector<uint8_t>> kept;  // for kMmap
  for (int64_t i = 0; i < shape.layers * shape.experts; ++i) {
    for (const MatrixName name : {MatrixName::kGate, MatrixName::kUp, MatrixName::kDown}) {
      kept.emplace_back(static_cast<size_t>(2 * shape.hidden * shape.ffn));
      for (size_t j = 0; j < kept.back().size(); j += 2) {
        kept.back()[j + 1] = 0x3c;  // small BF16 numbers, other ones for each expert
        kept.back()[j] = static_cast<uint8_t>(i + static_cast<int>(j) % 7);
      }
      CHECK(
          store->Add(i / shape.experts, i % shape.experts, name, kept.back(), {}, ScaleType::kFloat32).ok());
    }
  }
  CHECK(store->Freeze().ok());
  return store;
}

Status PinAll(ExpertStore& store, const std::shared_ptr<const GpuDriver>& driver,
              int64_t most_bytes = 1 << 30) {
  while (true) {
    const auto pinned = store.PinNext(driver, most_bytes);
    if (!pinned.ok()) return pinned.error();
    if (pinned.value() == 0) return {};
  }
}

void TestWhatIsMissingIsSaid() {
  CHECK_CONTAINS(GpuDriver::Open("libno_such_driver.so").error().message,
                 "the GPU's driver is not to be had: ");
  CHECK_CONTAINS(GpuDriver::Open("libc.so.6").error().message, "libc.so.6 has no function cuInit");
  FailNext("cuInit", 1, 100);
  CHECK_EQ(GpuDriver::Open(STAND_IN_DRIVER).error().message, "the GPU's driver: cuInit: failed (100)");
  FailNext("cuDevicePrimaryCtxRetain", 1, kOutOfMemory);
  CHECK_CONTAINS(GpuDriver::Open(STAND_IN_DRIVER).error().message, "out of memory (2)");
  CHECK_EQ(Contexts(), 0);
}

void TestAPinnedStoreIsReadWhereItLies() {
  const auto store = NewStore(Residency::kArena);
  CHECK_EQ(store->Record(0, 0).error().message, "the expert store is not pinned");
  CHECK(PinAll(*store, OpenDriver()).ok());
  CHECK(store->residency() == Residency::kPinned);
  const int64_t bytes = store->RecordBytes().value();
  CHECK_EQ(RegisteredBytes(), 6 * bytes);  // these records are whole pages
  CHECK_EQ(std::string(Calls()), Text("register ", 6 * bytes, " bytes\n"));
  for (int64_t i = 0; i < 6; ++i) {
    const PinnedRecord record = store->Record(i / 3, i % 3).value();
    CHECK_EQ(record.bytes.data(),
             store->Expert(i / 3, i % 3)[MatrixName::kGate].weights);  // what kernels read
    std::vector<uint8_t> copied(static_cast<size_t>(bytes));
    const int32_t id = static_cast<int32_t>(i % 3);
    CHECK(store->CopyRecords(i / 3, {&id, 1}, copied).ok());
    CHECK_EQ(std::memcmp(copied.data(), record.bytes.data(), copied.size()), 0);
  }
  CHECK_EQ(store->Record(0, 3).error().message, "expert: expected 0 <= expert < 3, got 3");
  store->Close(Fail("closed for the test"));
  CHECK_EQ(store->Record(0, 0).error().message, "closed for the test");
  CHECK_EQ(RegisteredBytes(), 0);
  CHECK_EQ(Contexts(), 0);
}

void TestClosingLeavesWhatIsBeingCopied() {
  const auto store = NewStore(Residency::kArena);
  CHECK(PinAll(*store, OpenDriver()).ok());
  auto record = std::make_unique<PinnedRecord>(store->Record(1, 2).value());
  const uint8_t first = record->bytes[0];
  (void)Calls();
  store->Close(Fail("closed for the test"));
  CHECK_EQ(std::string(Calls()), "");
  CHECK(RegisteredBytes() > 0);
  CHECK_EQ(int{record->bytes[0]}, int{first});
  std::async(std::launch::async, [&] { record.reset(); }).get();  // the last copy ends on another thread
  CHECK_CONTAINS(std::string(Calls()), "unregister ");
  CHECK_EQ(RegisteredBytes(), 0);
}

void TestRegistrationThatFailsInTheMiddleLeavesAnArena() {
  const auto store = NewStore(Residency::kArena);
  const auto driver = OpenDriver();
  const int64_t bytes = store->RecordBytes().value();
  (void)Calls();
  FailNext("cuMemHostRegister_v2", 3, kOutOfMemory);
  CHECK_EQ(PinAll(*store, driver, 2 * bytes - 1).error().message,
           "the GPU's driver: cuMemHostRegister: out of memory (2)");
  const std::string in = Text("register ", bytes, " bytes\n"), out = "un" + in;
  CHECK_EQ(std::string(Calls()), in + in + out + out);
  CHECK_EQ(RegisteredBytes(), 0);
  CHECK(store->residency() == Residency::kArena);
  CHECK(store->Read().ok());
  CHECK(PinAll(*store, driver, 2 * bytes).ok());  // for instance when its owner may lock more memory
  CHECK_EQ(std::string(Calls()), Text("register ", 2 * bytes, " bytes\n", "register ", 2 * bytes, " bytes\n",
                                      "register ", 2 * bytes, " bytes\n"));
}

void TestMatricesInAnotherOrderAreNoRecord() {
  const auto store = ExpertStore::Create(Compute::Create(1, "scalar").value(), FindCodec("bf16").value(),
                                         {1, 1, 256, 128}, Residency::kArena)
                         .value();
  const std::vector<uint8_t> matrix(2 * 256 * 128);
  for (const MatrixName name : {MatrixName::kUp, MatrixName::kGate, MatrixName::kDown}) {
    CHECK(store->Add(0, 0, name, matrix, {}, ScaleType::kFloat32).ok());
  }
  CHECK(store->Freeze().ok());
  CHECK(PinAll(*store, OpenDriver()).ok());
  CHECK_EQ(store->Record(0, 0).error().message,
           "layer 0, expert 0, up: was not added in the order gate, up, down");
}

void TestOnlyAnArenaIsPinned() {
  const auto mapped = NewStore(Residency::kMmap);
  CHECK_CONTAINS(mapped->PinNext(OpenDriver(), 1).error().message, "the experts lie in mapped files");
  CHECK(mapped->residency() == Residency::kMmap);
}

void TestExpertsForAGpu() {
  const auto store = NewStore(Residency::kArena);
  GpuMoeExperts gpu(OpenDriver());
  (void)Calls();
  int stream = 0;
  for (const int64_t tokens : {1, 3, 200}) {
    std::vector<uint16_t> hidden(static_cast<size_t>(tokens * kShape.hidden), 0x3f80);
    std::vector<int32_t> ids(static_cast<size_t>(tokens * 2));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i) % 3;
    const std::vector<float> weights(ids.size(), 0.5f);
    const Routing routing{ids.data(), weights.data(), tokens, 2};
    std::vector<float> expected(hidden.size()), actual(hidden.size());
    const int32_t layer = 1;
    CHECK(MoeExperts(*store, layer, hidden.data(), routing, expected.data()).ok());
    CHECK(expected[0] != 0);
    CHECK(gpu.Run(*store, {&layer, hidden.data(), routing, actual.data()}, &stream).ok());
    CHECK(actual == expected);
  }
  const std::string calls = Calls();
  CHECK_CONTAINS(calls, Text("to host 4 bytes\nto host 8 bytes\nto host 8 bytes\nto host ", 2 * kShape.hidden,
                             " bytes\nsynchronize\nto device ", 4 * kShape.hidden, " bytes\n"));
}

void TestFailuresForAGpuAreErrors() {
  const auto store = NewStore(Residency::kArena);
  const std::vector<uint16_t> hidden(static_cast<size_t>(kShape.hidden), 0x3f80);
  std::vector<float> out(hidden.size());
  const int32_t layer = 0, ids[] = {0}, wrong[] = {7};
  const float weights[] = {1};
  int stream = 0;
  GpuMoeExperts gpu(OpenDriver());
  for (const char* function : {"cuStreamSynchronize", "cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2"}) {
    FailNext(function, 1, 700);
    CHECK_CONTAINS(
        gpu.Run(*store, {&layer, hidden.data(), {ids, weights, 1, 1}, out.data()}, &stream).error().message,
        "failed (700)");
    CHECK(gpu.Run(*store, {&layer, hidden.data(), {ids, weights, 1, 1}, out.data()}, &stream).ok());
  }
  CHECK_CONTAINS(
      gpu.Run(*store, {&layer, hidden.data(), {wrong, weights, 1, 1}, out.data()}, &stream).error().message,
      "7");
  int other = 0;
  FailNext("cuMemHostRegister_v2", 1, kOutOfMemory);  // pageable memory will do
  CHECK(gpu.Run(*store, {&layer, hidden.data(), {ids, weights, 1, 1}, out.data()}, &other).ok());
}

void TestALaneForAGpu() {
  const auto store = NewStore(Residency::kArena);
  const auto lane = ExpertLane::Create(store, 2, std::chrono::milliseconds(60'000)).value();
  GpuExpertLane gpu(OpenDriver());
  int stream = 0;
  std::vector<uint16_t> hidden(static_cast<size_t>(3 * kShape.hidden), 0x3f80);
  const int32_t layer = 1, ids[] = {0, 1, 2, 2, 1, 0};
  const float weights[] = {1, .5f, 1, .5f, 1, .5f};
  std::vector<float> expected(hidden.size()), first(hidden.size()), second(hidden.size());
  CHECK(MoeExperts(*store, layer, hidden.data(), {ids, weights, 3, 2}, expected.data()).ok());
  const ExpertOperands operands{&layer, hidden.data(), {ids, weights, 3, 2}, nullptr};
  (void)Calls();
  for (int round = 0; round < 3; ++round) {
    int32_t tickets[] = {0, 0};
    std::fill(first.begin(), first.end(), 0.0f);
    CHECK(gpu.Submit(lane, 0, operands, &tickets[0], &stream).ok());
    CHECK(gpu.Submit(lane, 1, operands, &tickets[1], &stream).ok());
    CHECK(gpu.Wait(lane, 0, first.data(), &stream).ok());
    CHECK(gpu.Wait(lane, 1, second.data(), &stream).ok());
    CHECK(first == expected);
    CHECK(second == expected);
    CHECK(tickets[0] == 1 && tickets[1] == 1);
  }
  CHECK_CONTAINS(std::string(Calls()),
                 Text("to host ", 6 * kShape.hidden, " bytes\ncall the host\nto device 4 bytes\n"));
  CHECK(lane->TakeFailure().ok());
}

void TestFailuresOfALaneForAGpuReachTheNextCall() {
  const auto store = NewStore(Residency::kArena);
  const auto lane = ExpertLane::Create(store, 1, std::chrono::milliseconds(60'000)).value();
  GpuExpertLane gpu(OpenDriver());
  int stream = 0;
  const std::vector<uint16_t> hidden(static_cast<size_t>(kShape.hidden), 0x3f80);
  std::vector<float> out(hidden.size());
  const int32_t layer = 0, ids[] = {0}, wrong[] = {7};
  const float weights[] = {1};
  int32_t ticket = 0;
  const auto submit = [&](const int32_t* chosen, int64_t slot = 0) {
    return gpu.Submit(lane, slot, {&layer, hidden.data(), {chosen, weights, 1, 1}, nullptr}, &ticket,
                      &stream);
  };
  for (const char* function : {"cuLaunchHostFunc", "cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2"}) {
    FailNext(function, 1, 700);
    CHECK_CONTAINS(submit(ids).error().message, "failed (700)");
    CHECK(submit(ids).ok());
    CHECK(gpu.Wait(lane, 0, out.data(), &stream).ok());
  }
  CHECK(submit(wrong).ok());  // the stream is not there yet, for all that the host knows
  CHECK(gpu.Wait(lane, 0, out.data(), &stream).ok());
  CHECK_CONTAINS(submit(ids).error().message, "names expert 7");
  CHECK(submit(ids, 5).ok());
  CHECK_CONTAINS(lane->TakeFailure().error().message, "slot: expected 0 to 0, got 5");
  CHECK(submit(ids).ok());
  CHECK(gpu.Wait(lane, 0, out.data(), &stream).ok());
}

void TestALostJobOfALaneForAGpuIsAnErrorAndNotAHang() {
  const auto store = NewStore(Residency::kArena);
  const auto lane = ExpertLane::Create(store, 1, std::chrono::milliseconds(100)).value();
  GpuExpertLane gpu(OpenDriver());
  int stream = 0;
  const std::vector<uint16_t> hidden(static_cast<size_t>(kShape.hidden), 0x3f80);
  std::vector<float> out(hidden.size());
  const int32_t layer = 1, ids[] = {0};
  const float weights[] = {1};
  int32_t ticket = 0;
  const auto submit = [&] {
    return gpu.Submit(lane, 0, {&layer, hidden.data(), {ids, weights, 1, 1}, nullptr}, &ticket, &stream);
  };
  std::promise<void> begun, end;
  std::thread blocker([&] {  // has the pool, so that no job is done
    const ThreadPool::Session session(store->pool());
    begun.set_value();
    end.get_future().wait();
  });
  begun.get_future().wait();
  CHECK(submit().ok());
  CHECK(gpu.Wait(lane, 0, out.data(), &stream).ok());  // the stream waited, and goes on
  const std::string late = "the routed experts of layer 1 are not done after 100 ms";
  CHECK_EQ(submit().error().message, late);
  CHECK(submit().ok());  // as if it had been on the stream before: it does not wait again, and is noted
  CHECK_EQ(lane->TakeFailure().error().message, late);
  end.set_value();
  blocker.join();
}

}  // namespace
}  // namespace hmoe

int main() {
  hmoe::TestWhatIsMissingIsSaid();
  hmoe::TestAPinnedStoreIsReadWhereItLies();
  hmoe::TestClosingLeavesWhatIsBeingCopied();
  hmoe::TestRegistrationThatFailsInTheMiddleLeavesAnArena();
  hmoe::TestMatricesInAnotherOrderAreNoRecord();
  hmoe::TestOnlyAnArenaIsPinned();
  hmoe::TestExpertsForAGpu();
  hmoe::TestFailuresForAGpuAreErrors();
  hmoe::TestALaneForAGpu();
  hmoe::TestFailuresOfALaneForAGpuReachTheNextCall();
  hmoe::TestALostJobOfALaneForAGpuIsAnErrorAndNotAHang();
  return hmoe::test::failures;
}
