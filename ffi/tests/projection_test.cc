// Every ISA that this machine offers, with every codec.

#include <cfloat>

#include "kernels/isa.h"
#include "kernels/linear.h"
#include "tests/check.h"
#include "tests/random_matrix.h"

namespace hmoe {
namespace {

using test::Sharing;

struct Case {
  const Isa& isa;
  Codec codec;
  int64_t rows, cols, tokens;
  Sharing sharing = Sharing::kMost;
};

std::vector<float> Multiply(const Case& c, const Matrix& matrix, const std::vector<uint16_t>& activations,
                            int threads) {
  const auto pool = ThreadPool::Create(threads).value();
  std::vector<float> out(static_cast<size_t>(c.tokens * c.rows));
  Linear(*pool, c.isa, c.codec, matrix, activations.data(), c.tokens, out.data());
  return out;
}

void CheckAgainstDouble(const Case& c) {
  std::mt19937 random(static_cast<unsigned>(c.rows * 1000 + c.cols));
  const test::RandomMatrix weights(c.codec, c.rows, c.cols, random, c.sharing);
  const auto activations = test::RandomActivations(c.tokens * c.cols, random);
  const auto out = Multiply(c, weights.matrix(), activations, 2);
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t r = 0; r < c.rows; ++r) {
      double exact = 0, magnitude = 0;
      for (int64_t i = 0; i < c.cols; ++i) {
        const double product =
            weights.Value(r, i) * FloatFromBf16(activations[static_cast<size_t>(t * c.cols + i)]);
        exact += product;
        magnitude += std::fabs(product);
      }
      // No chain of additions is longer than a block, then one per 32 columns (tiles) and the final
      // reduction, with a product for the scale; half an ulp each.
      const double longest = 128 + static_cast<double>(c.cols) / 32 + 18;
      const double error = std::fabs(out[static_cast<size_t>(t * c.rows + r)] - exact);
      CHECK(error <= longest * FLT_EPSILON / 2 * magnitude);
    }
  }
}

void CheckOneTokenAloneHasTheSameBits(const Case& c) {
  std::mt19937 random(7);
  const test::RandomMatrix weights(c.codec, c.rows, c.cols, random);
  const auto activations = test::RandomActivations(c.tokens * c.cols, random);
  const auto together = Multiply(c, weights.matrix(), activations, 3);
  for (int64_t t = 0; t < c.tokens; ++t) {
    const Case one{c.isa, c.codec, c.rows, c.cols, 1};
    const std::vector<uint16_t> row(activations.begin() + t * c.cols, activations.begin() + (t + 1) * c.cols);
    const auto alone = Multiply(one, weights.matrix(), row, 1);
    CHECK(std::equal(alone.begin(), alone.end(), together.begin() + t * c.rows));
  }
}

void TestIsa(const Isa& isa) {
  for (const Codec& codec : AllCodecs()) {
    for (int64_t cols : {1, 7, 127, 128, 129, 200, 456, 1160}) {
      cols = RoundUp(cols, codec.column_multiple);
      for (const Sharing sharing : {Sharing::kMost, Sharing::kOne}) {
        CheckAgainstDouble({isa, codec, 131, cols, 3, sharing});
      }
    }
    const int64_t cols = RoundUp(136, codec.column_multiple);
    for (const int64_t rows : {1, 9, 300}) CheckAgainstDouble({isa, codec, rows, cols, 5});
    // As few as one, more than a tile, and more than one call takes.
    for (const int64_t tokens : {2, 7, 17, 33, 70, 290}) {
      CheckOneTokenAloneHasTheSameBits({isa, codec, 67, RoundUp(264, codec.column_multiple), tokens});
    }
    // So many that their activations pass through the cache in parts.
    CheckOneTokenAloneHasTheSameBits({isa, codec, 35, RoundUp(3500, codec.column_multiple), 129});
  }
}

void TestForcedNames() {
  CHECK_EQ(std::string(SelectIsa("scalar").value()->name), "scalar");
  CHECK_EQ(SelectIsa("auto").value()->name, OfferedIsaNames().front());
  CHECK_CONTAINS(SelectIsa("mmx").error().message, "isa 'mmx' is unknown: expected auto, amx, avx512_bf16");
}

}  // namespace
}  // namespace hmoe

int main() {
  for (const std::string& name : hmoe::OfferedIsaNames()) hmoe::TestIsa(*hmoe::SelectIsa(name).value());
  hmoe::TestForcedNames();
  return hmoe::test::failures;
}
