#include "machine/memory.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <utility>

#include "machine/topology.h"
#include "store/arena.h"
#include "tests/check.h"

namespace hmoe {
namespace {

constexpr int64_t kPage = 4096;

// The policy for memory at an address; -1 where the kernel does not tell.
int PolicyAt(const uint8_t* address) {
  int mode = -1;
  return syscall(SYS_get_mempolicy, &mode, nullptr, 0ul, address, MPOL_F_ADDR) == 0 ? mode : -1;
}

int NumMappings() {
  std::ifstream file("/proc/self/maps");
  int count = 0;
  for (std::string line; std::getline(file, line);) ++count;
  return count;
}

void TestPagesAreZeroAndMove() {
  Pages pages = Pages::Allocate(3 * kPage + 5).value();
  CHECK_EQ(std::ssize(pages.bytes()), 4 * kPage);
  CHECK(std::all_of(pages.bytes().begin(), pages.bytes().end(), [](uint8_t byte) { return byte == 0; }));
  pages.bytes().back() = 7;
  Pages other = std::move(pages);
  CHECK(pages.bytes().empty());
  CHECK_EQ(int{other.bytes().back()}, 7);
  other = Pages::Allocate(1).value();
  CHECK_EQ(std::ssize(other.bytes()), kPage);
}

void TestMemoryThatIsNotToBeHadIsAnErrorValue() {
  CHECK_CONTAINS(Pages::Allocate(int64_t{1} << 60).error().message,
                 "memory: 1152921504606846976 bytes are not to be had: ");
  CHECK_CONTAINS(Pages::Allocate(0).error().message, "expected a positive number of bytes, got 0");
}

void TestPartsCoverEverythingAndDifferByOne() {
  for (const int64_t bytes : {0, 1, 5, 4096, 12345}) {
    for (const int64_t parts : {1, 2, 3, 4, 7}) {
      CHECK_EQ(PartBegin(bytes, 0, parts), 0);
      CHECK_EQ(PartBegin(bytes, parts, parts), bytes);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t size = PartBegin(bytes, part + 1, parts) - PartBegin(bytes, part, parts);
        CHECK(size == bytes / parts || size == bytes / parts + 1);
      }
    }
  }
  CHECK_EQ(PartBegin(int64_t{1} << 50, 255, 256), (int64_t{1} << 50) / 256 * 255);
}

void TestRowsAreBoundAndUnbound() {
  const Pages pages = Pages::Allocate(64 * kPage).value();
  const int node = DetectTopology().nodes.front().memory_node;
  const uint8_t* first = pages.bytes().data();
  const Status bound = BindRows(pages.bytes(), std::vector{node, kNoMemoryNode, node});
  if (!bound.ok()) {  // a container may refuse
    CHECK_CONTAINS(bound.error().message, "memory is not bound to NUMA nodes: mbind: ");
    return;
  }
  if (PolicyAt(first) >= 0 && node != kNoMemoryNode) {
    // 21 1/3 and 42 2/3 pages: the seams are rounded to 21 and 43.
    for (const auto& [page, policy] : {std::pair{0, MPOL_PREFERRED},
                                       {20, MPOL_PREFERRED},
                                       {21, MPOL_DEFAULT},
                                       {42, MPOL_DEFAULT},
                                       {43, MPOL_PREFERRED},
                                       {63, MPOL_PREFERRED}}) {
      CHECK_EQ(PolicyAt(first + page * kPage), static_cast<int>(policy));
    }
  }
  CHECK(Unbind(pages.bytes()).ok());
  if (PolicyAt(first) >= 0) CHECK_EQ(PolicyAt(first), static_cast<int>(MPOL_DEFAULT));
}

void TestANodeThatDoesNotExistIsAnErrorValue() {
  const Pages pages = Pages::Allocate(4 * kPage).value();
  for (const int node : {900, 5000}) {
    CHECK_CONTAINS(BindRows(pages.bytes(), std::vector{node}).error().message,
                   "memory is not bound to NUMA nodes: ");
  }
}

std::vector<uint8_t> Matrix(int64_t bytes, int seed) {
  std::vector<uint8_t> matrix(static_cast<size_t>(bytes));
  for (size_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<uint8_t>(i * 31 + i / 251 + seed);
  return matrix;
}

void TestAnArenaHoldsTheBytes() {
  for (const char* nodes : {"0", "0;1", "0;1;0;1"}) {
    const auto pool =
        ThreadPool::Create(FindTopology(nodes).value().num_cpus(), FindTopology(nodes).value()).value();
    Arena arena = Arena::Create(*pool, 20 << 20).value();
    std::vector<const uint8_t*> copies;
    const std::vector<int64_t> sizes = {1,       63, 4096,           100001,
                                        5 << 20, 7,  (9 << 20) + 13, 8 << 20};  // the last: beyond
    for (const int64_t size : sizes)
      copies.push_back(arena.Copy(Matrix(size, static_cast<int>(size))).value());
    for (size_t i = 0; i < sizes.size(); ++i) {
      const auto expected = Matrix(sizes[i], static_cast<int>(sizes[i]));
      CHECK(std::equal(expected.begin(), expected.end(), copies[i]));
      CHECK_EQ(reinterpret_cast<uintptr_t>(copies[i]) % 64, 0u);
    }
  }
}

// The kernel allows some 65,000 mappings, and a large model has more matrices than that.
void TestManyMatricesAreFewMappings() {
  const auto pool =
      ThreadPool::Create(2, FindTopology("0;4000").value()).value();  // node 1 has no memory node
  constexpr int kMatrices = 300;
  Arena arena = Arena::Create(*pool, kMatrices * 10 * kPage).value();
  const auto matrix = Matrix(10 * kPage, 1);
  CHECK(arena.Copy(matrix).ok());
  const int before = NumMappings();
  for (int i = 1; i < kMatrices; ++i) CHECK(arena.Copy(matrix).ok());
  CHECK(NumMappings() < before + 20);
}

}  // namespace
}  // namespace hmoe

int main() {
  hmoe::TestPagesAreZeroAndMove();
  hmoe::TestMemoryThatIsNotToBeHadIsAnErrorValue();
  hmoe::TestPartsCoverEverythingAndDifferByOne();
  hmoe::TestRowsAreBoundAndUnbound();
  hmoe::TestANodeThatDoesNotExistIsAnErrorValue();
  hmoe::TestAnArenaHoldsTheBytes();
  hmoe::TestManyMatricesAreFewMappings();
  return hmoe::test::failures;
}
