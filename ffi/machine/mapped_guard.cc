#include "machine/mapped_guard.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>

namespace hmoe {
namespace {

constexpr int kMaxGuards = 1 << 16;

// Static and never freed: a signal may be reading while a guard goes.
struct Slot {
  std::atomic<uintptr_t> begin{0};  // 0: free
  std::atomic<uintptr_t> end{0};
  std::atomic<bool> was_hit{false};
};

Slot slots[kMaxGuards];
std::atomic<int> num_used{0};  // slots from here on were never used
std::atomic<int64_t> num_hits{0};
std::mutex mutex;  // of changes, not of reading
std::atomic<bool> being_passed_on{false};
struct sigaction before;
uintptr_t page_size;

// Calls `visit` with every slot in use that has a byte in [begin, end).
template <typename Visit>
void VisitOverlapping(uintptr_t begin, uintptr_t end, const Visit& visit) {
  for (int i = 0; i < num_used.load(); ++i) {
    const uintptr_t slot_begin = slots[i].begin.load(), slot_end = slots[i].end.load();
    if (slot_begin != 0 && slot_begin < end && begin < slot_end) visit(slots[i]);
  }
}

// Only what a signal handler may do: atomics, and system calls without buffers.
bool PutZeros(uintptr_t address) {
  uintptr_t end = 0;
  VisitOverlapping(address, address + 1, [&](const Slot& slot) { end = std::max(end, slot.end.load()); });
  if (end == 0) return false;
  const uintptr_t begin = address / page_size * page_size;
  end = (end + page_size - 1) / page_size * page_size;
  // NOLINTNEXTLINE(performance-no-int-to-ptr)
  void* memory = mmap(reinterpret_cast<void*>(begin), end - begin, PROT_READ,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  if (memory == MAP_FAILED) return false;
  VisitOverlapping(begin, end, [](Slot& slot) { slot.was_hit.store(true); });
  num_hits.fetch_add(1);
  return true;
}

void Handle(int number, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  if (info->si_code == BUS_ADRERR && PutZeros(address)) return;
  // Handlers of others may lead back here, if they were installed between two guards: then nobody knows the
  // signal.
  const bool is_again = being_passed_on.exchange(true);
  if (!is_again && (before.sa_flags & SA_SIGINFO) != 0) {
    before.sa_sigaction(number, info, context);
  } else if (!is_again && before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
    before.sa_handler(number);
  } else {
    signal(number, SIG_DFL);  // a read is tried again, and ends the process as it would have
    if (info->si_code != BUS_ADRERR) raise(number);
  }
  being_passed_on.store(false);
}

// Whenever a guard is made: others may have installed handlers of their own since.
void InstallHandler() {
  struct sigaction current;
  if (sigaction(SIGBUS, nullptr, &current) != 0) return;
  if ((current.sa_flags & SA_SIGINFO) != 0 && current.sa_sigaction == &Handle) return;
  page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  before = current;
  struct sigaction ours{};
  ours.sa_sigaction = &Handle;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGBUS, &ours, nullptr);
}

}  // namespace

MappedGuard::MappedGuard(std::span<const uint8_t> memory) : slot_(-1) {
  if (memory.empty()) return;
  const std::lock_guard lock(mutex);
  InstallHandler();
  int free = 0;
  while (free < num_used.load() && slots[free].begin.load() != 0) ++free;
  if (free == kMaxGuards) return;
  const auto begin = reinterpret_cast<uintptr_t>(memory.data());
  slots[free].was_hit.store(false);
  slots[free].end.store(begin + memory.size());
  slots[free].begin.store(begin);
  if (free == num_used.load()) num_used.store(free + 1);
  slot_ = free;
}

MappedGuard::MappedGuard(MappedGuard&& other) noexcept : slot_(std::exchange(other.slot_, -1)) {}

MappedGuard::~MappedGuard() {
  if (slot_ < 0) return;
  const std::lock_guard lock(mutex);
  slots[slot_].begin.store(0);
}

bool MappedGuard::was_hit() const { return slot_ >= 0 && slots[slot_].was_hit.load(); }

int64_t MappedGuardHits() { return num_hits.load(); }

}  // namespace hmoe
