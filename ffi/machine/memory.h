// Anonymous memory for weights: in huge pages, and each part of a matrix near to the threads that read it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/result.h"

namespace hmoe {

// The small one, in bytes.
int64_t PageSize();

// Owned memory, whole pages, zero until written. Huge pages where the system has them: with small ones plain
// reads were 4 to 7 % slower on a virtual machine.
class Pages {
 public:
  static Result<Pages> Allocate(int64_t bytes);
  Pages(Pages&& other) noexcept;
  Pages& operator=(Pages&& other) noexcept;
  ~Pages();

  std::span<uint8_t> bytes() const { return memory_; }

 private:
  explicit Pages(std::span<uint8_t> memory) : memory_(memory) {}

  std::span<uint8_t> memory_;
};

// Where part `part` of `num_parts` begins: the parts of a row-major matrix with R rows are its rows
// [part * R / num_parts, (part + 1) * R / num_parts), to within a row. Addresses that BindRows is given are
// rounded to the nearest small page, so that less than half a page at each seam lies on a neighbour's node.
inline int64_t PartBegin(int64_t bytes, int64_t part, int64_t num_parts) {
  return bytes / num_parts * part + bytes % num_parts * part / num_parts;
}

// Asks that part n be taken from the kernel's memory node memory_nodes[n] when it is first touched, and from
// another node when that one is full. A part with kNoMemoryNode is left to whoever touches it first. Fails
// where the kernel refuses, as in many containers: then all parts are.
Status BindRows(std::span<uint8_t> memory, std::span<const int> memory_nodes);

// Takes the request back. What was touched stays where it is. Every range with a request of its own counts
// against the limit of mappings per process (65,530 by default), and a large model has more parts than that.
Status Unbind(std::span<uint8_t> memory);

}  // namespace hmoe
