#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <future>

#include "store/registry.h"
#include "tests/check.h"

namespace hmoe {
namespace {

constexpr StoreShape kShape{2, 3, 136, 8};  // hidden, then ffn: gate and up are [8, 136], down is [136, 8]

std::shared_ptr<ExpertStore> NewStore(const char* codec, StoreShape shape = kShape) {
  auto compute = Compute::Create(2, "scalar").value();
  return ExpertStore::Create(compute, FindCodec(codec).value(), shape).value();
}

const std::vector<uint8_t> kWeights(8 * 136), kScales(2 * 4);

void Fill(ExpertStore& store) {
  for (int64_t layer = 0; layer < kShape.layers; ++layer) {
    for (int64_t expert = 0; expert < kShape.experts; ++expert) {
      for (const MatrixName name : {MatrixName::kGate, MatrixName::kUp, MatrixName::kDown}) {
        CHECK(store.Add(layer, expert, name, kWeights, kScales, ScaleType::kFloat32).ok());
      }
    }
  }
}

void TestWhatDoesNotFitIsRefused() {
  const auto store = NewStore("fp8_block");
  const auto refusal = [&](int64_t layer, int64_t expert, size_t weight_bytes, size_t scale_bytes) {
    const std::span<const uint8_t> weights(kWeights.data(), weight_bytes),
        scales(kScales.data(), scale_bytes);
    return store->Add(layer, expert, MatrixName::kGate, weights, scales, ScaleType::kFloat32).error().message;
  };
  CHECK_EQ(refusal(2, 0, 1088, 8), "layer: expected 0 <= layer < 2, got 2");
  CHECK_EQ(refusal(0, -1, 1088, 8), "expert: expected 0 <= expert < 3, got -1");
  CHECK_EQ(
      refusal(1, 2, 1087, 8),
      "layer 1, expert 2, gate: expected 1088 bytes of weights for [8, 136] in codec fp8_block, got 1087");
  CHECK_EQ(refusal(1, 2, 1088, 4),
           "layer 1, expert 2, gate: expected 2 or 16 float32 scales for [8, 136] in codec fp8_block, got 4 "
           "bytes");
  CHECK_EQ(FindMatrixName("gates").error().message, "matrix 'gates' is unknown: expected gate, up or down");

  CHECK(store->Add(0, 0, MatrixName::kGate, kWeights, kScales, ScaleType::kFloat32).ok());
  CHECK_EQ(refusal(0, 0, 1088, 8), "layer 0, expert 0, gate: was added before");
}

void TestBf16HasNoScales() {
  const auto store = NewStore("bf16");
  const std::vector<uint8_t> weights(2 * 8 * 136);
  CHECK(store->Add(0, 0, MatrixName::kUp, weights, {}, ScaleType::kFloat32).ok());
  CHECK_CONTAINS(store->Add(0, 0, MatrixName::kDown, weights, kScales, ScaleType::kFloat32).error().message,
                 "expected no scales in codec bf16, got 8 bytes");
}

void TestHolesAreNamed() {
  const auto store = NewStore("fp8_block");
  CHECK_EQ(store->Read().error().message, "the expert store is not frozen");
  CHECK(store->Add(0, 0, MatrixName::kGate, kWeights, kScales, ScaleType::kFloat32).ok());
  CHECK_EQ(
      store->Freeze().error().message,
      "the expert store is incomplete: 17 of 18 matrices are missing, the first is layer 0, expert 0, up");
}

void TestAFrozenStoreIsReadAndNotChanged() {
  const auto store = NewStore("fp8_block");
  Fill(*store);
  CHECK(store->Freeze().ok());
  CHECK(store->Read().ok());
  CHECK_CONTAINS(store->Add(0, 0, MatrixName::kGate, kWeights, kScales, ScaleType::kFloat32).error().message,
                 "nothing can be added");
  CHECK_EQ(store->Expert(1, 2)[MatrixName::kDown].rows, 136);
}

void TestCloseWaitsForReaders() {
  const auto store = NewStore("fp8_block");
  Fill(*store);
  CHECK(store->Freeze().ok());
  std::future<void> closed;
  {
    const auto reading = store->Read();
    closed = std::async(std::launch::async, [&] { store->Close(Fail("closed for the test")); });
    CHECK(closed.wait_for(std::chrono::milliseconds(20)) == std::future_status::timeout);
  }
  closed.get();
  CHECK_EQ(store->Read().error().message, "closed for the test");
  CHECK_EQ(store->Freeze().error().message, "closed for the test");
  store->Close(Fail("closed again"));
  CHECK_EQ(store->Read().error().message, "closed again");
}

void TestAnArenaKeepsACopy() {
  const Topology topology = FindTopology("0;1").value();
  auto compute = Compute::Create(2, "scalar", topology).value();
  const auto store =
      ExpertStore::Create(compute, FindCodec("fp8_block").value(), kShape, Residency::kArena).value();
  for (int expert = 0; expert < 6; ++expert) {
    for (const MatrixName name : {MatrixName::kGate, MatrixName::kUp, MatrixName::kDown}) {
      const std::vector<uint8_t> weights(8 * 136, static_cast<uint8_t>(10 * expert + static_cast<int>(name)));
      const std::vector<uint8_t> scales(2 * 4, static_cast<uint8_t>(100 + expert));
      CHECK(store->Add(expert / 3, expert % 3, name, weights, scales, ScaleType::kFloat32).ok());
    }
  }
  CHECK(store->Freeze().ok());
  CHECK(store->residency() == Residency::kArena);
  const Matrix& down = store->Expert(1, 2)[MatrixName::kDown];
  CHECK_EQ(int{down.weights[0]}, 52);
  CHECK_EQ(int{down.weights[8 * 136 - 1]}, 52);
  CHECK_EQ(int{down.scales[7]}, 105);
  store->Close(Fail("closed for the test"));
  CHECK(!store->placement_refusal().has_value());
}

void TestAnArenaThatCannotFitIsRefusedAtOnce() {
  auto compute = Compute::Create(1, "scalar").value();
  const auto store =
      ExpertStore::Create(compute, FindCodec("bf16").value(), {60, 256, 1 << 20, 1 << 20}, Residency::kArena);
  CHECK_CONTAINS(store.error().message, "the experts' memory: ");
  CHECK_CONTAINS(store.error().message, " bytes are not to be had: ");
}

// The scales of the last expert lie in a file of two pages, which then loses the second.
void TestAFileThatIsCutOffIsAnError() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::FILE* file = std::tmpfile();
  CHECK_EQ(ftruncate(fileno(file), static_cast<off_t>(2 * page)), 0);
  void* memory = mmap(nullptr, 2 * page, PROT_READ, MAP_SHARED, fileno(file), 0);
  CHECK(memory != MAP_FAILED);
  const std::span<const uint8_t> scales(static_cast<const uint8_t*>(memory) + page, kScales.size());
  const auto store = NewStore("fp8_block", {1, 1, 136, 8});
  for (const MatrixName name : {MatrixName::kGate, MatrixName::kUp, MatrixName::kDown}) {
    CHECK(store->Add(0, 0, name, kWeights, scales, ScaleType::kFloat32).ok());
  }
  CHECK(store->Freeze().ok());
  std::vector<uint8_t> record(static_cast<size_t>(store->RecordBytes().value()), 1);
  const std::array<int32_t, 1> experts = {0};
  CHECK(store->CopyRecords(0, experts, record).ok());

  CHECK_EQ(ftruncate(fileno(file), static_cast<off_t>(page)), 0);
  for (int i = 0; i < 2; ++i) {
    CHECK_EQ(store->CopyRecords(0, experts, record).error().message,
             "a file that holds experts was cut off while it was mapped: their weights are gone");
  }
  auto compute = Compute::Create(2, "scalar").value();
  const auto copying =
      ExpertStore::Create(compute, FindCodec("fp8_block").value(), {1, 1, 136, 8}, Residency::kArena).value();
  CHECK_EQ(ftruncate(fileno(file), 0), 0);
  const std::span<const uint8_t> first(static_cast<const uint8_t*>(memory), kScales.size());
  CHECK_CONTAINS(copying->Add(0, 0, MatrixName::kGate, kWeights, first, ScaleType::kFloat32).error().message,
                 "was cut off while it was mapped");
  store->Close(Fail("closed for the test"));
  munmap(memory, 2 * page);
  std::fclose(file);
}

void TestResidenciesByName() {
  CHECK(FindResidency("auto", 1).value() == Residency::kMmap);
  CHECK(FindResidency("auto", 2).value() == Residency::kArena);
  CHECK(FindResidency("mmap", 2).value() == Residency::kMmap);
  CHECK(FindResidency("arena", 1).value() == Residency::kArena);
  CHECK_EQ(FindResidency("disk", 1).error().message,
           "residency 'disk' is unknown: expected auto, mmap or arena");
}

void TestSizesAreChecked() {
  auto compute = Compute::Create(1, "scalar").value();
  const auto store = ExpertStore::Create(compute, FindCodec("bf16").value(), {1, 1, 0, 1});
  CHECK_EQ(store.error().message, "hidden: expected a positive number, got 0");
}

void TestIdsAreNotReused() {
  const int64_t first = Stores().Add(NewStore("bf16"));
  Stores().Remove(first);
  Stores().Remove(first);
  const int64_t second = Stores().Add(NewStore("bf16"));
  CHECK(first != second);
  CHECK_EQ(Stores().Find(first).error().message, "expert store " + std::to_string(first) + " is closed");
  CHECK_EQ(Stores().Closed(first).message, Stores().Find(first).error().message);
  CHECK_EQ(Stores().Find(second + 1).error().message,
           "expert store " + std::to_string(second + 1) + " does not exist");
  CHECK(Stores().Find(second).ok());
  Stores().Remove(second);
}

}  // namespace
}  // namespace hmoe

int main() {
  hmoe::TestWhatDoesNotFitIsRefused();
  hmoe::TestBf16HasNoScales();
  hmoe::TestHolesAreNamed();
  hmoe::TestAFrozenStoreIsReadAndNotChanged();
  hmoe::TestCloseWaitsForReaders();
  hmoe::TestAnArenaKeepsACopy();
  hmoe::TestAnArenaThatCannotFitIsRefusedAtOnce();
  hmoe::TestAFileThatIsCutOffIsAnError();
  hmoe::TestResidenciesByName();
  hmoe::TestSizesAreChecked();
  hmoe::TestIdsAreNotReused();
  return hmoe::test::failures;
}
