// Memory that a call borrows and the next call reuses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

namespace hmoe {

// A bump allocator over a few chunks. After the first call of a given size there is one chunk and no malloc.
// What Take returns lives until the next Reset, is aligned to a cache line, and is not initialised.
class Scratch {
 public:
  void Reset() {
    if (chunks_.size() > 1) {
      int64_t total = 0;
      for (const Chunk& chunk : chunks_) total += chunk.bytes;
      chunks_.clear();
      chunks_.push_back(Allocate(total));
    }
    used_ = 0;
  }

  template <typename T>
  T* Take(int64_t count) {
    static_assert(std::is_trivially_destructible_v<T>, "nobody will call the destructor");
    return reinterpret_cast<T*>(TakeBytes(count * static_cast<int64_t>(sizeof(T))));
  }

 private:
  static constexpr int64_t kAlign = 64;

  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t(kAlign)); }
  };
  struct Chunk {
    std::unique_ptr<std::byte, Free> memory;
    int64_t bytes;
  };

  static Chunk Allocate(int64_t bytes) {
    void* memory = ::operator new(static_cast<size_t>(bytes), std::align_val_t(kAlign));
    return {std::unique_ptr<std::byte, Free>(static_cast<std::byte*>(memory)), bytes};
  }

  std::byte* TakeBytes(int64_t bytes) {
    const int64_t rounded = (bytes + kAlign - 1) / kAlign * kAlign;
    if (chunks_.empty() || used_ + rounded > chunks_.back().bytes) {
      chunks_.push_back(Allocate(rounded));
      used_ = 0;
    }
    std::byte* taken = chunks_.back().memory.get() + used_;
    used_ += rounded;
    return taken;
  }

  std::vector<Chunk> chunks_;
  int64_t used_ = 0;  // of the last chunk
};

}  // namespace hmoe
