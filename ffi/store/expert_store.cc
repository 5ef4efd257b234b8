#include "store/expert_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace hmoe {
namespace {

constexpr const char* kMatrixNames[kNumMatrices] = {"gate", "up", "down"};

std::string Place(int64_t layer, int64_t expert, MatrixName name) {
  return Text("layer ", layer, ", expert ", expert, ", ", kMatrixNames[static_cast<int>(name)]);
}

Error CutOff() {
  return Fail("a file that holds experts was cut off while it was mapped: their weights are gone");
}

}  // namespace

Result<MatrixName> FindMatrixName(std::string_view name) {
  for (int i = 0; i < kNumMatrices; ++i) {
    if (name == kMatrixNames[i]) return static_cast<MatrixName>(i);
  }
  return Fail("matrix '", name, "' is unknown: expected gate, up or down");
}

const char* ResidencyName(Residency residency) {
  constexpr const char* kNames[] = {"mmap", "arena", "pinned"};
  return kNames[static_cast<int>(residency)];
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
      experts_(static_cast<size_t>(shape.layers * shape.experts)) {}

Status ExpertStore::OpenArena() {
  if (residency_ != Residency::kArena) return {};
  // Each array of weights or scales begins a cache line, and each expert a page.
  const int64_t padding = kRecordAlign * 2 * kNumMatrices + PageSize();
  const int64_t expert_bytes =
      2 * codec_.MostBytes(shape_.ffn, shape_.hidden) + codec_.MostBytes(shape_.hidden, shape_.ffn);
  auto arena = Arena::Create(pool(), shape_.layers * shape_.experts * (expert_bytes + padding));
  if (!arena.ok()) return arena.error();
  arena_ = std::make_shared<Arena>(std::move(arena).value());
  return {};
}

// Neighbours in a file share a guard: there are tens of thousands of matrices, and few runs of them.
void ExpertStore::GuardWeights() {
  std::ranges::sort(sources_, {}, [](const auto& part) { return part.data(); });
  std::span<const uint8_t> run = sources_.front();
  for (const auto& part : sources_) {
    const ptrdiff_t gap = part.data() - (run.data() + run.size());
    if (gap > kRecordAlign) {
      guards_.emplace_back(run);
      run = part;
    } else if (gap + std::ssize(part) > 0) {
      run = {run.data(), part.data() + part.size()};
    }
  }
  guards_.emplace_back(run);
  sources_ = {};
}

Status ExpertStore::CheckIntact() const {
  if (MappedGuardHits() == 0) return {};
  for (const MappedGuard& guard : guards_) {
    if (guard.was_hit()) return CutOff();
  }
  return {};
}

Status ExpertStore::MoveToArena(Matrix& matrix, std::span<const uint8_t> weights,
                                std::span<const uint8_t> scales) {
  const MappedGuard weights_guard(weights), scales_guard(scales);
  const auto copied = arena_->Copy(weights);
  if (!copied.ok()) return copied.error();
  matrix.weights = copied.value();
  if (!scales.empty()) {
    const auto copied_scales = arena_->Copy(scales);
    if (!copied_scales.ok()) return copied_scales.error();
    matrix.scales = copied_scales.value();
  }
  return weights_guard.was_hit() || scales_guard.was_hit() ? CutOff() : Status();
}

Residency ExpertStore::residency() const {
  const std::shared_lock lock(use_);
  return residency_;
}

std::optional<std::string> ExpertStore::placement_refusal() const {
  const std::shared_lock lock(use_);
  return arena_ ? arena_->refusal() : std::nullopt;
}

Status ExpertStore::CheckPlace(int64_t layer, int64_t expert) const {
  if (layer < 0 || layer >= shape_.layers) {
    return Fail("layer: expected 0 <= layer < ", shape_.layers, ", got ", layer);
  }
  if (expert < 0 || expert >= shape_.experts) {
    return Fail("expert: expected 0 <= expert < ", shape_.experts, ", got ", expert);
  }
  return {};
}

Status ExpertStore::Add(int64_t layer, int64_t expert, MatrixName name, std::span<const uint8_t> weights,
                        std::span<const uint8_t> scales, ScaleType scale_type) {
  if (Status checked = CheckPlace(layer, expert); !checked.ok()) return checked;
  const bool is_down = name == MatrixName::kDown;
  auto matrix = codec_.Describe(is_down ? shape_.hidden : shape_.ffn, is_down ? shape_.ffn : shape_.hidden,
                                weights, scales, scale_type);
  if (!matrix.ok()) return Fail(Place(layer, expert, name), ": ", matrix.error().message);

  const std::unique_lock lock(use_);
  if (state_ != State::kBuilding) return Fail("the expert store is frozen or closed: nothing can be added");
  Matrix& held =
      experts_[static_cast<size_t>(layer * shape_.experts + expert)].matrices[static_cast<size_t>(name)];
  if (held.weights != nullptr) return Fail(Place(layer, expert, name), ": was added before");
  if (arena_) {
    const auto& matrices = Expert(layer, expert).matrices;
    const auto is_new = [](const Matrix& matrix) { return matrix.weights == nullptr; };
    if (std::ranges::all_of(matrices, is_new)) arena_->BeginRecord();
    if (Status moved = MoveToArena(matrix.value(), weights, scales); !moved.ok()) return moved;
  } else {
    sources_.push_back(weights);
    if (!scales.empty()) sources_.push_back(scales);
  }
  held = matrix.value();
  added_bytes_ += std::ssize(weights) + std::ssize(scales);
  const std::array parts = {static_cast<int64_t>(weights.size()), static_cast<int64_t>(scales.size())};
  auto& first = part_bytes_[static_cast<size_t>(name)];
  if (first[0] == 0) first = parts;
  is_uniform_ = is_uniform_ && first == parts;
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
  if (residency_ == Residency::kMmap) GuardWeights();
  state_ = State::kFrozen;
  return {};
}

Result<int64_t> ExpertStore::RecordBytes() const {
  if (!is_uniform_) return Fail("the experts have no common record: the number of their scales differs");
  int64_t bytes = 0;
  for (const auto& [weights, scales] : part_bytes_) {
    bytes += RoundUp(weights, kRecordAlign) + RoundUp(scales, kRecordAlign);
  }
  return bytes;
}

Status ExpertStore::CopyRecords(int64_t layer, std::span<const int32_t> experts,
                                std::span<uint8_t> out) const {
  const auto reading = Read();
  if (!reading.ok()) return reading.error();
  const auto record_bytes = RecordBytes();
  if (!record_bytes.ok()) return record_bytes.error();
  if (std::ssize(out) != std::ssize(experts) * record_bytes.value()) {
    return Fail("out: expected ", std::ssize(experts), " records of ", record_bytes.value(), " bytes, got ",
                out.size(), " bytes");
  }
  for (const int32_t expert : experts) {
    if (Status checked = CheckPlace(layer, expert); !checked.ok()) return checked;
  }
  uint8_t* to = out.data();
  const auto copy = [&to](const uint8_t* from, int64_t bytes) {
    if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
    to += RoundUp(bytes, kRecordAlign);
  };
  for (const int32_t expert : experts) {
    for (size_t name = 0; name < kNumMatrices; ++name) {
      const Matrix& matrix = Expert(layer, expert).matrices[name];
      copy(matrix.weights, part_bytes_[name][0]);
      copy(matrix.scales, part_bytes_[name][1]);
    }
  }
  return CheckIntact();
}

Result<int64_t> ExpertStore::PinNext(const std::shared_ptr<const GpuDriver>& driver, int64_t most_bytes) {
  const std::unique_lock lock(use_);
  if (state_ == State::kClosed) return closed_;
  if (state_ == State::kBuilding) return Fail("the expert store is not frozen");
  if (!arena_) return Fail("only an arena can be pinned: the experts lie in mapped files");
  auto pinned = arena_->PinNext(driver, most_bytes);
  if (pinned.ok() && pinned.value() == 0) residency_ = Residency::kPinned;
  return pinned;
}

Result<PinnedRecord> ExpertStore::Record(int64_t layer, int64_t expert) const {
  const auto reading = Read();
  if (!reading.ok()) return reading.error();
  if (residency_ != Residency::kPinned) return Fail("the expert store is not pinned");
  if (Status checked = CheckPlace(layer, expert); !checked.ok()) return checked.error();
  const auto record_bytes = RecordBytes();
  if (!record_bytes.ok()) return record_bytes.error();
  const ExpertWeights& weights = Expert(layer, expert);
  const uint8_t* const begin = weights[MatrixName::kGate].weights;
  const uint8_t* next = begin;
  for (size_t name = 0; name < kNumMatrices; ++name) {
    const Matrix& matrix = weights.matrices[name];
    const uint8_t* const scales = next + RoundUp(part_bytes_[name][0], kRecordAlign);
    if (matrix.weights != next || (part_bytes_[name][1] > 0 && matrix.scales != scales)) {
      return Fail(Place(layer, expert, static_cast<MatrixName>(name)),
                  ": was not added in the order gate, up, down");
    }
    next = scales + RoundUp(part_bytes_[name][1], kRecordAlign);
  }
  return PinnedRecord{arena_, {begin, static_cast<size_t>(record_bytes.value())}};
}

void ExpertStore::Close(Error error) {
  const std::unique_lock lock(use_);
  state_ = State::kClosed;
  closed_ = std::move(error);
  experts_.clear();
  guards_.clear();
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
