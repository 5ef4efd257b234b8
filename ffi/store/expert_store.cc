#include "store/expert_store.h"

#include <utility>

namespace hmoe {
namespace {

constexpr const char* kMatrixNames[kNumMatrices] = {"gate", "up", "down"};

std::string Place(int64_t layer, int64_t expert, MatrixName name) {
  return Text("layer ", layer, ", expert ", expert, ", ", kMatrixNames[static_cast<int>(name)]);
}

}  // namespace

Result<MatrixName> FindMatrixName(std::string_view name) {
  for (int i = 0; i < kNumMatrices; ++i) {
    if (name == kMatrixNames[i]) return static_cast<MatrixName>(i);
  }
  return Fail("matrix '", name, "' is unknown: expected gate, up or down");
}

Result<std::shared_ptr<ExpertStore>> ExpertStore::Create(std::shared_ptr<Compute> compute, const Codec& codec,
                                                         const StoreShape& shape) {
  const std::pair<const char*, int64_t> sizes[] = {{"num_layers", shape.layers},
                                                   {"num_experts", shape.experts},
                                                   {"hidden", shape.hidden},
                                                   {"ffn", shape.ffn}};
  for (const auto& [name, size] : sizes) {
    if (size <= 0) return Fail(name, ": expected a positive number, got ", size);
  }
  return std::shared_ptr<ExpertStore>(new ExpertStore(std::move(compute), codec, shape));
}

ExpertStore::ExpertStore(std::shared_ptr<Compute> compute, const Codec& codec, const StoreShape& shape)
    : compute_(std::move(compute)),
      codec_(codec),
      shape_(shape),
      experts_(static_cast<size_t>(shape.layers * shape.experts)) {}

Status ExpertStore::Add(int64_t layer, int64_t expert, MatrixName name, std::span<const uint8_t> weights,
                        std::span<const uint8_t> scales, ScaleType scale_type) {
  if (layer < 0 || layer >= shape_.layers) {
    return Fail("layer: expected 0 <= layer < ", shape_.layers, ", got ", layer);
  }
  if (expert < 0 || expert >= shape_.experts) {
    return Fail("expert: expected 0 <= expert < ", shape_.experts, ", got ", expert);
  }
  const bool is_down = name == MatrixName::kDown;
  const auto matrix = codec_.Describe(is_down ? shape_.hidden : shape_.ffn,
                                      is_down ? shape_.ffn : shape_.hidden, weights, scales, scale_type);
  if (!matrix.ok()) return Fail(Place(layer, expert, name), ": ", matrix.error().message);

  const std::unique_lock lock(use_);
  if (state_ != State::kBuilding) return Fail("the expert store is frozen or closed: nothing can be added");
  Matrix& held =
      experts_[static_cast<size_t>(layer * shape_.experts + expert)].matrices[static_cast<size_t>(name)];
  if (held.weights != nullptr) return Fail(Place(layer, expert, name), ": was added before");
  held = matrix.value();
  added_bytes_ += std::ssize(weights) + std::ssize(scales);
  return {};
}

Status ExpertStore::Freeze() {
  const std::unique_lock lock(use_);
  if (state_ == State::kClosed) return closed_;
  int64_t missing = 0;
  std::string first;
  for (int64_t layer = 0; layer < shape_.layers; ++layer) {
    for (int64_t expert = 0; expert < shape_.experts; ++expert) {
      for (int name = 0; name < kNumMatrices; ++name) {
        if (Expert(layer, expert)[static_cast<MatrixName>(name)].weights != nullptr) continue;
        if (missing++ == 0) first = Place(layer, expert, static_cast<MatrixName>(name));
      }
    }
  }
  if (missing > 0) {
    return Fail("the expert store is incomplete: ", missing, " of ",
                shape_.layers * shape_.experts * kNumMatrices, " matrices are missing, the first is ", first);
  }
  state_ = State::kFrozen;
  return {};
}

void ExpertStore::Close(Error error) {
  const std::unique_lock lock(use_);
  state_ = State::kClosed;
  closed_ = std::move(error);
  experts_.clear();
}

Result<ExpertStore::Reading> ExpertStore::Read() const {
  Reading reading(use_);
  if (state_ == State::kClosed) return closed_;
  if (state_ == State::kBuilding) return Fail("the expert store is not frozen");
  return reading;
}

void ExpertStore::CountCall(int64_t experts_read, double seconds) {
  const std::lock_guard lock(stats_mutex_);
  stats_.calls += 1;
  stats_.bytes += experts_read * (added_bytes_ / (shape_.layers * shape_.experts));
  stats_.seconds += seconds;
}

StoreStats ExpertStore::stats() const {
  const std::lock_guard lock(stats_mutex_);
  return stats_;
}

void ExpertStore::ResetStats() {
  const std::lock_guard lock(stats_mutex_);
  stats_ = {};
}

}  // namespace hmoe
