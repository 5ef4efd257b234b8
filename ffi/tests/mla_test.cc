// Latent attention by every ISA that this machine offers, in buffers without a byte to spare.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/isa.h"
#include "kernels/mla_attention.h"
#include "kernels/mla_expansion.h"
#include "kernels/mla_prefill.h"
#include "tests/check.h"
#include "tests/random_matrix.h"

namespace hmoe {
namespace {

using Kernel = Status (*)(ThreadPool&, const MlaKernels&, const MlaAttentionArgs&);

// Owns the arguments of a call. All tokens are of one sequence, so that both kernels can have them.
struct Case {
  Case(int64_t tokens, int64_t first_position, int64_t page_size) {
    std::mt19937 random(static_cast<unsigned>(tokens * 1000 + first_position));
    args.tokens = tokens, args.heads = 3, args.nope_dim = 5, args.rope_dim = 6, args.rank = 42,
    args.value_dim = 7, args.page_size = page_size, args.scale = 0.07f;
    args.table_len = CeilDiv(first_position + tokens, page_size), args.num_pages = args.table_len + 1;
    nope = test::RandomActivations(tokens * args.heads * args.nope_dim, random);
    rope = test::RandomActivations(tokens * args.heads * args.rope_dim, random);
    key = test::RandomActivations(args.heads * args.nope_dim * args.rank, random);
    value = test::RandomActivations(args.heads * args.value_dim * args.rank, random);
    cache = test::RandomActivations(args.num_pages * page_size * (args.rank + args.rope_dim), random);
    for (int64_t t = 0; t < tokens; ++t) {
      positions.push_back(static_cast<int32_t>(first_position + t));
      for (int64_t i = 0; i < args.table_len; ++i) tables.push_back(static_cast<int32_t>(args.table_len - i));
    }
  }

  std::vector<uint16_t> Run(Kernel kernel, const Isa& isa, int threads) const {
    const auto pool = ThreadPool::Create(threads).value();
    std::vector<uint16_t> out(static_cast<size_t>(args.tokens * args.heads * args.value_dim));
    const Status status = kernel(*pool, *isa.mla, Given(positions, out));
    CHECK(status.ok());
    return out;
  }

  // The context in pieces of `piece` positions, then attention of all tokens to it.
  std::vector<uint16_t> RunExpanded(const Isa& isa, int threads, int32_t piece) const {
    const auto pool = ThreadPool::Create(threads).value();
    const int32_t length = positions.back() + 1;
    const int64_t num_chunks = CeilDiv(length, kMlaChunk);
    std::vector<uint16_t> words(static_cast<size_t>(args.heads * num_chunks * MlaWidths(args).words()),
                                0x7fc1);
    const MlaExpanded expanded{words.data(), num_chunks};
    std::vector<uint16_t> out(static_cast<size_t>(args.tokens * args.heads * args.value_dim));
    for (int32_t begin = 0; begin < length; begin += piece) {
      const std::vector<int32_t> ends{begin, std::min(begin + piece, length) - 1};
      MlaAttentionArgs given = Given(ends, out);
      given.tokens = 2;
      CHECK(MlaExpand(*pool, *isa.mla, given, expanded).ok());
    }
    CHECK(MlaAttendExpanded(*pool, *isa.mla, Given(positions, out), expanded).ok());
    return out;
  }

  MlaAttentionArgs Given(const std::vector<int32_t>& where, std::vector<uint16_t>& out) const {
    MlaAttentionArgs given = args;
    given.nope = nope.data(), given.rope = rope.data(), given.key = key.data(), given.value = value.data();
    given.cache = cache.data(), given.tables = tables.data(), given.positions = where.data();
    given.out = out.data();
    return given;
  }

  MlaAttentionArgs args;
  std::vector<uint16_t> nope, rope, key, value, cache;
  std::vector<int32_t> tables, positions;
};

double RelativeDifference(const std::vector<uint16_t>& a, const std::vector<uint16_t>& b) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double x = FloatFromBf16(a[i]), y = FloatFromBf16(b[i]);
    difference += (x - y) * (x - y);
    size += y * y;
  }
  return std::sqrt(difference / size);
}

// Each rounds weights, values or mixtures, and results by 2^-9 in the root mean square, and queries or keys
// in scores of deviation 1, which counts twice; the two are independent; 2 for the tail. The exact meaning is
// tested from Python.
void CheckBothFormsAgree(const Isa& isa, const Case& c) {
  const auto absorbed = c.Run(MlaAttention, isa, 2), expanded = c.Run(MlaPrefill, isa, 2);
  CHECK(RelativeDifference(absorbed, expanded) <= 2 * std::sqrt(10.0) * std::ldexp(1.0, -9));
}

void CheckThreadsDoNotChangeTheBits(const Isa& isa, const Case& c) {
  for (const Kernel kernel : {MlaAttention, MlaPrefill})
    CHECK(c.Run(kernel, isa, 1) == c.Run(kernel, isa, 3));
}

void CheckKeptKeysAndValuesGiveTheSameBits(const Isa& isa, const Case& c) {
  const auto anew = c.Run(MlaPrefill, isa, 1);
  for (const int32_t piece : {1000000, 512, 77}) CHECK(c.RunExpanded(isa, 2, piece) == anew);
}

}  // namespace
}  // namespace hmoe

int main() {
  using namespace hmoe;
  for (const std::string& name : OfferedIsaNames()) {
    const Isa& isa = *SelectIsa(name).value();
    for (const Case& c : {Case(1, 0, 3), Case(17, 4, 5), Case(3, 510, 64), Case(2, 8300, 64)}) {
      CheckBothFormsAgree(isa, c);
      CheckThreadsDoNotChangeTheBits(isa, c);
      CheckKeptKeysAndValuesGiveTheSameBits(isa, c);
    }
  }
  return test::failures;
}
