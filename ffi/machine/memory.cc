#include "machine/memory.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "machine/topology.h"

namespace hmoe {
namespace {

constexpr int kBitsPerWord = 8 * sizeof(unsigned long);
constexpr int kMaxMemoryNodes = 1024;  // as Linux has them at most

// By the system call itself, so that libnuma is not needed.
Status SetPolicy(uintptr_t begin, uintptr_t end, int mode, const unsigned long* nodes,
                 unsigned long num_bits) {
  if (begin == end || syscall(SYS_mbind, begin, end - begin, mode, nodes, num_bits, 0u) == 0) return {};
  return Fail("memory is not bound to NUMA nodes: mbind: ", std::strerror(errno));
}

// PREFERRED and not BIND: with BIND a full node ends the process instead of lending from its neighbour.
Status Prefer(uintptr_t begin, uintptr_t end, int memory_node) {
  if (memory_node >= kMaxMemoryNodes)
    return Fail("memory is not bound to NUMA nodes: there is no node ", memory_node);
  unsigned long nodes[kMaxMemoryNodes / kBitsPerWord] = {};
  nodes[memory_node / kBitsPerWord] = 1ul << memory_node % kBitsPerWord;
  return SetPolicy(begin, end, MPOL_PREFERRED, nodes, kMaxMemoryNodes);
}

uintptr_t RoundDown(uintptr_t address) { return address - address % static_cast<uintptr_t>(PageSize()); }

}  // namespace

int64_t PageSize() {
  static const int64_t size = sysconf(_SC_PAGESIZE);
  return size;
}

Result<Pages> Pages::Allocate(int64_t bytes) {
  if (bytes <= 0) return Fail("memory: expected a positive number of bytes, got ", bytes);
  const auto size = static_cast<size_t>(bytes + (PageSize() - bytes % PageSize()) % PageSize());
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED)
    return Fail("memory: ", bytes, " bytes are not to be had: ", std::strerror(errno));
  madvise(memory, size, MADV_HUGEPAGE);  // a hint
  return Pages({static_cast<uint8_t*>(memory), size});
}

Pages::Pages(Pages&& other) noexcept : memory_(std::exchange(other.memory_, {})) {}

Pages& Pages::operator=(Pages&& other) noexcept {
  std::swap(memory_, other.memory_);
  return *this;
}

Pages::~Pages() {
  if (!memory_.empty()) munmap(memory_.data(), memory_.size());
}

Status BindRows(std::span<uint8_t> memory, std::span<const int> memory_nodes) {
  const auto start = reinterpret_cast<uintptr_t>(memory.data());
  const auto seam = [&](int64_t part) {
    const auto offset = PartBegin(std::ssize(memory), part, std::ssize(memory_nodes));
    return RoundDown(start + static_cast<uintptr_t>(offset + PageSize() / 2));
  };
  for (int64_t part = 0; part < std::ssize(memory_nodes); ++part) {
    const int memory_node = memory_nodes[static_cast<size_t>(part)];
    if (memory_node == kNoMemoryNode) continue;
    if (Status bound = Prefer(seam(part), seam(part + 1), memory_node); !bound.ok()) return bound;
  }
  return {};
}

Status Unbind(std::span<uint8_t> memory) {
  const uintptr_t begin = RoundDown(reinterpret_cast<uintptr_t>(memory.data()));
  const auto last = reinterpret_cast<uintptr_t>(memory.data() + memory.size() - 1);
  return SetPolicy(begin, RoundDown(last) + static_cast<uintptr_t>(PageSize()), MPOL_DEFAULT, nullptr, 0);
}

}  // namespace hmoe
