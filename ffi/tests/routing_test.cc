#include "kernels/routing.h"

#include "tests/check.h"

namespace hmoe {
namespace {

void TestPairsAreSortedByExpertThenToken() {
  const int32_t ids[] = {4, 1, 1, -1, 4, 4};
  const float weights[] = {0, 1, 2, 3, 4, 5};
  Scratch scratch;
  const Groups groups = GroupByExpert({ids, weights, 3, 2}, 6, scratch);

  CHECK_EQ(groups.experts.size(), 2u);
  CHECK_EQ(groups.experts[0].expert, 1);
  CHECK_EQ(groups.experts[1].expert, 4);
  CHECK_EQ(groups.experts[0].end, groups.experts[1].begin);
  CHECK_EQ(groups.pairs.size(), 5u);
  const int64_t tokens[] = {0, 1, 0, 2, 2};
  const float sorted[] = {1, 2, 0, 4, 5};
  for (size_t i = 0; i < 5; ++i) {
    CHECK_EQ(groups.pairs[i].token, tokens[i]);
    CHECK_EQ(groups.pairs[i].weight, sorted[i]);
  }
}

void TestNothingChosenIsNoGroups() {
  const int32_t ids[] = {-1, -1};
  const float weights[] = {1, 1};
  Scratch scratch;
  CHECK(GroupByExpert({ids, weights, 2, 1}, 3, scratch).experts.empty());
  CHECK(GroupByExpert({ids, weights, 2, 0}, 3, scratch).pairs.empty());
}

void TestABadIdIsNamed() {
  const int32_t ids[] = {0, 1, 2, -2, 3, 0};
  const float weights[6] = {};
  CHECK_EQ(CheckRouting({ids, weights, 1, 3}, 3).ok(), true);
  CHECK_EQ(CheckRouting({ids, weights, 3, 2}, 4).error().message,
           "ids: token 1, slot 1 names expert -2: expected 0 <= id < 4, or -1 for no expert");
  CHECK_CONTAINS(CheckRouting({ids + 4, weights, 1, 2}, 3).error().message, "token 0, slot 0 names expert 3");
}

}  // namespace
}  // namespace hmoe

int main() {
  hmoe::TestPairsAreSortedByExpertThenToken();
  hmoe::TestNothingChosenIsNoGroups();
  hmoe::TestABadIdIsNamed();
  return hmoe::test::failures;
}
