#include "base/scratch.h"

#include <cstring>

#include "tests/check.h"

namespace hmoe {
namespace {

void TestPiecesAreAlignedAndApart() {
  Scratch scratch;
  for (int round = 0; round < 3; ++round) {
    scratch.Reset();
    auto* a = scratch.Take<char>(100);
    auto* b = scratch.Take<double>(1000);
    auto* c = scratch.Take<char>(1);
    std::memset(a, 1, 100);
    std::memset(b, 2, 8000);
    *c = 3;
    CHECK_EQ(reinterpret_cast<uintptr_t>(b) % 64, 0u);
    CHECK_EQ(a[99] + *c, 4);
  }
}

void TestASecondCallOfTheSameSizeReusesTheMemory() {
  Scratch scratch;
  for (int i = 0; i < 9; ++i) scratch.Take<char>(1000);
  scratch.Reset();
  const char* first = scratch.Take<char>(1000);
  scratch.Reset();
  CHECK(scratch.Take<char>(1000) == first);
}

void TestNothingIsSomethingToTake() {
  Scratch scratch;
  scratch.Take<int>(0);
  CHECK(scratch.Take<int>(1) != nullptr);
}

}  // namespace
}  // namespace hmoe

int main() {
  hmoe::TestPiecesAreAlignedAndApart();
  hmoe::TestASecondCallOfTheSameSizeReusesTheMemory();
  hmoe::TestNothingIsSomethingToTake();
  return hmoe::test::failures;
}
