// Waiting for another thread: awake for about as long as going to sleep and being woken costs, then asleep.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace hmoe {

// Waiting awake for as long as a sleep and its wake-up cost is at most twice as dear as the better of the
// two, whatever comes. It bridges the barriers inside a call. It also bounds what is lost to a peer that
// another process keeps from running, and what a waiting thread takes from others on its CPU.
inline constexpr auto kSpin = std::chrono::microseconds(50);

// Awake until `value` is no longer `old` or the time is over; returns whether it changed.
inline bool SpinWhile(const std::atomic<int32_t>& value, int32_t old) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (value.load(std::memory_order_acquire) != old) return true;
#if defined(__SSE__)
      _mm_pause();
#endif
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

// std::atomic's wait and notify, less the table of waiters that all atomics of the program share, and with a
// limit to how many are woken.
inline void SleepWhile(std::atomic<int32_t>& value, int32_t old) {
  while (value.load(std::memory_order_seq_cst) == old) {
    syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
  }
}

// The same until the deadline at most; returns whether it changed.
inline bool SleepWhile(std::atomic<int32_t>& value, int32_t old,
                       std::chrono::steady_clock::time_point deadline) {
  while (value.load(std::memory_order_seq_cst) == old) {
    const auto left =
        std::chrono::duration_cast<std::chrono::nanoseconds>(deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) return false;
    const timespec limit{left.count() / 1'000'000'000, left.count() % 1'000'000'000};
    syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, &limit, nullptr, 0);
  }
  return true;
}

inline void WakeSleepers(std::atomic<int32_t>& value, int count) {
  syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

}  // namespace hmoe
