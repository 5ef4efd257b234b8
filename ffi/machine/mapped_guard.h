// Reading a file's mapping where the file has been cut off raises SIGBUS, which would end the process.
#pragma once

#include <cstdint>
#include <span>

namespace hmoe {

// While it lives, such a read inside `memory` finds zeros instead, and so does every later one from there to
// the end of `memory`; was_hit() then says so, of this guard and of all that share any of those pages. Other
// signals, and those of memory that nobody guards, go to whoever handled them before. There can be 65,536
// guards at once; what is more is not guarded.
class MappedGuard {
 public:
  explicit MappedGuard(std::span<const uint8_t> memory);
  MappedGuard(MappedGuard&& other) noexcept;
  MappedGuard& operator=(MappedGuard&& other) = delete;
  ~MappedGuard();

  bool was_hit() const;

 private:
  int slot_;  // -1 for none
};

// How many hits there have been in this process: what has not grown needs no look at any guard.
int64_t MappedGuardHits();

}  // namespace hmoe
