#include "store/arena.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "codec/codec.h"

namespace hmoe {
namespace {

constexpr int64_t kAlign = 64;

// As much as one fault fills, and far more than claiming it costs.
constexpr int64_t kTaskBytes = int64_t{2} << 20;

}  // namespace

Result<Arena> Arena::Create(ThreadPool& pool, int64_t expected_bytes) {
  Arena arena(pool);
  if (Status grown = arena.Grow(expected_bytes); !grown.ok()) return grown.error();
  return arena;
}

Status Arena::Grow(int64_t bytes) {
  auto pages = Pages::Allocate(bytes);
  if (!pages.ok()) return Fail("the experts' ", pages.error().message);
  pages_.push_back(std::move(pages).value());
  used_ = 0;
  records_.clear();
  // Ranges of one mapping that had no page yet when Bind split them are not always joined again after Unbind.
  pages_.back().bytes().front() = 0;
  return {};
}

void Arena::BeginRecord() {
  used_ = RoundUp(used_, PageSize());
  records_.push_back(used_);
}

Result<int64_t> Arena::PinNext(const std::shared_ptr<const GpuDriver>& driver, int64_t most_bytes) {
  if (pages_.size() > 1) return Fail("the experts' memory is in ", pages_.size(), " pieces");
  if (next_record_ == records_.size()) return 0;
  const auto end_of = [&](size_t record) {
    return record + 1 < records_.size() ? records_[record + 1] : RoundUp(used_, PageSize());
  };
  const int64_t begin = records_[next_record_];
  int64_t end = end_of(next_record_++);
  while (next_record_ < records_.size() && end_of(next_record_) - begin <= most_bytes)
    end = end_of(next_record_++);
  const auto records =
      pages_.back().bytes().subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
  auto pinned = PinnedMemory::Create(driver, records);
  if (!pinned.ok()) {
    pinned_.clear();
    next_record_ = 0;
    return pinned.error();
  }
  pinned_.push_back(std::move(pinned).value());
  return end - begin;
}

Result<const uint8_t*> Arena::Copy(std::span<const uint8_t> matrix) {
  const int64_t rounded = RoundUp(std::ssize(matrix), kAlign);
  if (used_ + rounded > std::ssize(pages_.back().bytes())) {
    if (Status grown = Grow(rounded); !grown.ok()) return grown.error();
  }
  const auto copy = pages_.back().bytes().subspan(static_cast<size_t>(used_), matrix.size());
  used_ += rounded;
  Bind(copy);
  CopyOnEveryNode(matrix, copy.data());
  if (!refusal_) (void)Unbind(copy);  // what could be bound can be unbound
  return copy.data();
}

void Arena::Bind(std::span<uint8_t> copy) {
  if (refusal_) return;
  if (Status bound = BindRows(copy, pool_->memory_nodes()); !bound.ok()) refusal_ = bound.error().message;
}

void Arena::CopyOnEveryNode(std::span<const uint8_t> matrix, uint8_t* copy) {
  const int num_nodes = pool_->num_nodes();
  const int64_t num_tasks = std::ssize(matrix) / num_nodes / kTaskBytes + 1;
  ThreadPool::Session session(*pool_);
  session.RunByNode(num_tasks, [&](int node, int64_t task) noexcept {
    const int64_t part = node * num_tasks + task, num_parts = num_nodes * num_tasks;
    const int64_t begin = PartBegin(std::ssize(matrix), part, num_parts);
    const int64_t end = PartBegin(std::ssize(matrix), part + 1, num_parts);
    std::memcpy(copy + begin, matrix.data() + begin, static_cast<size_t>(end - begin));
  });
}

}  // namespace hmoe
