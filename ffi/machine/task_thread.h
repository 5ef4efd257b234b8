// The thread of a pool that runs a task, as the task sees it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

namespace hmoe {

class TaskThread {
 public:
  explicit TaskThread(int index) : index_(index) {}

  // 0 for the caller of Run, then 1 to num_threads - 1.
  int index() const { return index_; }

  // Memory of this thread alone, until the task ends; the thread's later tasks get the same. Every call
  // inside a task gives the same memory, so a task takes all it needs at once. It is aligned to a page, not
  // initialised, and near to the thread, who is the first to touch it.
  template <typename T>
  T* Memory(int64_t count) {
    static_assert(std::is_trivially_destructible_v<T>, "nobody will call the destructor");
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (bytes > bytes_) Grow(bytes);
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  static constexpr std::align_val_t kAlign{4096};

  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, kAlign); }
  };

  void Grow(int64_t bytes) {
    memory_.reset();  // first, so that both are never held at once
    memory_.reset(static_cast<std::byte*>(::operator new(static_cast<size_t>(bytes), kAlign)));
    bytes_ = bytes;
  }

  const int index_;
  int64_t bytes_ = 0;
  std::unique_ptr<std::byte, Free> memory_;
};

}  // namespace hmoe
