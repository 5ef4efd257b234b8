#include "store/expert_store.h"

#include <utility>

namespace hmoe {
namespace {

constexpr const char* kMatrixNames[kNumMatrices] = {"gate", "up", "down"};

int64_t MatrixBytes(const Codec& codec, int64_t rows, int64_t cols) {
  return codec.WeightBytes(rows, cols) + codec.NumScales(rows, cols) * static_cast<int64_t>(sizeof(float));
}

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

Result<Residency> FindResidency(std::string_view name, int num_nodes) {
  if (name == "auto") return num_nodes > 1 ? Residency::kArena : Residency::kMmap;
  if (name == "mmap") return Residency::kMmap;
  if (name == "arena") return Residency::kArena;
  return Fail("residency '", name, "' is unknown: expected auto, mmap or arena");
}

Result<std::shared_ptr<ExpertStore>> ExpertStore::Create(std::shared_ptr<Compute> compute, const Codec& codec,
                                                         const StoreShape& shape, Residency residency) {
  const std::pair<const char*, int64_t> sizes[] = {{"num_layers", shape.layers},
                                                   {"num_experts", shape.experts},
                                                   {"hidden", shape.hidden},
                                                   {"ffn", shape.ffn}};
  for (const auto& [name, size] : sizes) {
    if (size <= 0) return Fail(name, ": expected a positive number, got ", size);
  }
  std::shared_ptr<ExpertStore> store(new ExpertStore(std::move(compute), codec, shape, residency));
  if (Status opened = store->OpenArena(); !opened.ok()) return opened.error();
  return store;
}

ExpertStore::ExpertStore(std::shared_ptr<Compute> compute, const Codec& codec, const StoreShape& shape,
                         Residency residency)
    : compute_(std::move(compute)),
      codec_(codec),
      shape_(shape),
      residency_(residency),
      expert_bytes_(2 * MatrixBytes(codec, shape.ffn, shape.hidden) +
                    MatrixBytes(codec, shape.hidden, shape.ffn)),
      experts_(static_cast<size_t>(shape.layers * shape.experts)) {}

Status ExpertStore::OpenArena() {
  if (residency_ != Residency::kArena) return {};
  constexpr int64_t kPadding = 64 * 2 * kNumMatrices;  // each array of weights or scales begins a cache line
  auto arena = Arena::Create(pool(), shape_.layers * shape_.experts * (expert_bytes_ + kPadding));
  if (!arena.ok()) return arena.error();
  arena_ = std::move(arena).value();
  return {};
}

Status ExpertStore::MoveToArena(Matrix& matrix, std::span<const uint8_t> weights,
                                std::span<const uint8_t> scales) {
  const auto copied = arena_->Copy(weights);
  if (!copied.ok()) return copied.error();
  matrix.weights = copied.value();
  if (scales.empty()) return {};
  const auto copied_scales = arena_->Copy(scales);
  if (!copied_scales.ok()) return copied_scales.error();
  matrix.scales = copied_scales.value();
  return {};
}

std::optional<std::string> ExpertStore::placement_refusal() const {
  const std::shared_lock lock(use_);
  return arena_ ? arena_->refusal() : std::nullopt;
}

Matrix ExpertStore::ShapeOf(MatrixName name) const {
  const bool is_down = name == MatrixName::kDown;
  return {nullptr, nullptr, is_down ? shape_.hidden : shape_.ffn, is_down ? shape_.ffn : shape_.hidden};
}

Status ExpertStore::Add(int64_t layer, int64_t expert, MatrixName name, std::span<const uint8_t> weights,
                        std::span<const uint8_t> scales) {
  if (layer < 0 || layer >= shape_.layers) {
    return Fail("layer: expected 0 <= layer < ", shape_.layers, ", got ", layer);
  }
  if (expert < 0 || expert >= shape_.experts) {
    return Fail("expert: expected 0 <= expert < ", shape_.experts, ", got ", expert);
  }
  Matrix matrix = ShapeOf(name);
  const int64_t weight_bytes = codec_.WeightBytes(matrix.rows, matrix.cols);
  if (std::ssize(weights) != weight_bytes) {
    return Fail(Place(layer, expert, name), ": expected ", weight_bytes, " bytes of weights for [",
                matrix.rows, ", ", matrix.cols, "] in codec ", codec_.name, ", got ", weights.size());
  }
  const int64_t num_scales = codec_.NumScales(matrix.rows, matrix.cols);
  if (std::ssize(scales) != num_scales * static_cast<int64_t>(sizeof(float))) {
    return Fail(Place(layer, expert, name), ": expected ", num_scales, " float32 scales for [", matrix.rows,
                ", ", matrix.cols, "] in codec ", codec_.name, ", got ", scales.size(), " bytes");
  }
  matrix.weights = weights.data();
  matrix.scales = scales.empty() ? nullptr : scales.data();

  const std::unique_lock lock(use_);
  if (state_ != State::kBuilding) return Fail("the expert store is frozen or closed: nothing can be added");
  Matrix& held =
      experts_[static_cast<size_t>(layer * shape_.experts + expert)].matrices[static_cast<size_t>(name)];
  if (held.weights != nullptr) return Fail(Place(layer, expert, name), ": was added before");
  if (arena_) {
    if (Status moved = MoveToArena(matrix, weights, scales); !moved.ok()) return moved;
  }
  held = matrix;
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
  arena_.reset();
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
  stats_.bytes += experts_read * expert_bytes_;
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
