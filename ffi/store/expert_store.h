// Where every routed expert's weights lie: (layer, expert, matrix) -> address, in the checkpoint's own
// layout.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "codec/codec.h"
#include "kernels/compute.h"
#include "kernels/matrix.h"
#include "machine/mapped_guard.h"
#include "store/arena.h"

namespace hmoe {

enum class MatrixName { kGate, kUp, kDown };
inline constexpr int kNumMatrices = 3;
Result<MatrixName> FindMatrixName(std::string_view name);

struct ExpertWeights {
  std::array<Matrix, kNumMatrices> matrices;

  const Matrix& operator[](MatrixName name) const { return matrices[static_cast<size_t>(name)]; }
};

// `layers` counts the layers that have routed experts.
struct StoreShape {
  int64_t layers = 0;
  int64_t experts = 0;
  int64_t hidden = 0;
  int64_t ffn = 0;
};

// Every part of an expert's record begins a cache line, as every matrix in an arena does.
inline constexpr int64_t kRecordAlign = 64;

// An expert's record where the store itself reads it, which stays there as long as `owner` lives.
struct PinnedRecord {
  std::shared_ptr<const Arena> owner;
  std::span<const uint8_t> bytes;
};

// Where the weights lie while the store lives.
enum class Residency {
  kMmap,    // where the caller of Add has them, who keeps them until Close has returned
  kArena,   // in memory of the store's own, split over the NUMA nodes: the caller may let them go after Add
  kPinned,  // there, and GPUs read it too
};
const char* ResidencyName(Residency residency);

// What a store can be made with: pinned it becomes by PinNext. "auto" points into the caller's memory on one
// node. On several it copies, because the pages of a file lie on the node that read them first, and half of
// all reads would cross between the sockets.
Result<Residency> FindResidency(std::string_view name, int num_nodes);

struct StoreStats {
  int64_t calls = 0;
  int64_t bytes = 0;  // of weights and scales, each expert once per call
  double seconds = 0;
};

// Built by one thread (Add, then Freeze), read by any.
class ExpertStore {
 public:
  static Result<std::shared_ptr<ExpertStore>> Create(std::shared_ptr<Compute> compute, const Codec& codec,
                                                     const StoreShape& shape,
                                                     Residency residency = Residency::kMmap);

  Status Add(int64_t layer, int64_t expert, MatrixName name, std::span<const uint8_t> weights,
             std::span<const uint8_t> scales, ScaleType scale_type);

  // Refuses a store with holes, and names the first.
  Status Freeze();

  // Pins the next part of a frozen store's arena for the GPUs of `driver`: whole experts, at least one.
  // Returns its bytes; 0 when all is pinned, and then the residency is kPinned. What fails unpins everything,
  // and the store goes on as an arena.
  Result<int64_t> PinNext(const std::shared_ptr<const GpuDriver>& driver, int64_t most_bytes);

  // Fails for a store that is not pinned or not open, and if its matrices were not added in the order of
  // records.
  Result<PinnedRecord> Record(int64_t layer, int64_t expert) const;

  // An expert as one record: gate, up and down, of each the weights and then the scales, every part at a
  // multiple of kRecordAlign bytes. Fails for a store whose experts differ in the number of their scales.
  Result<int64_t> RecordBytes() const;

  // Copies the records of some experts of a layer, one after the other. Fails for an id or a size that is
  // wrong, and when the store is not open.
  Status CopyRecords(int64_t layer, std::span<const int32_t> experts, std::span<uint8_t> out) const;

  // Waits for the readings in progress. Later readings fail with `error`.
  void Close(Error error);

  // Holds the store open. Fails when it is closed or not frozen.
  using Reading = std::shared_lock<std::shared_mutex>;
  Result<Reading> Read() const;

  // Fails if a file behind the weights was cut off since it was mapped: then what was read may be zeros.
  Status CheckIntact() const;

  const ExpertWeights& Expert(int64_t layer, int64_t expert) const {  // while reading
    return experts_[static_cast<size_t>(layer * shape_.experts + expert)];
  }
  const StoreShape& shape() const { return shape_; }
  const Codec& codec() const { return codec_; }
  const Isa& isa() const { return compute_->isa; }
  ThreadPool& pool() const { return *compute_->pool; }
  Residency residency() const;

  // Why the arena could not be bound to the NUMA nodes, if it could not.
  std::optional<std::string> placement_refusal() const;

  void CountCall(int64_t experts_read, double seconds);
  StoreStats stats() const;
  void ResetStats();

 private:
  enum class State { kBuilding, kFrozen, kClosed };

  ExpertStore(std::shared_ptr<Compute> compute, const Codec& codec, const StoreShape& shape,
              Residency residency);
  Status OpenArena();
  Status CheckPlace(int64_t layer, int64_t expert) const;
  void GuardWeights();
  Status MoveToArena(Matrix& matrix, std::span<const uint8_t> weights, std::span<const uint8_t> scales);

  const std::shared_ptr<Compute> compute_;
  const Codec codec_;
  const StoreShape shape_;
  Residency residency_;
  std::shared_ptr<Arena> arena_;  // unless the residency is kMmap, until Close
  int64_t added_bytes_ = 0;       // of all experts, weights and scales
  std::vector<ExpertWeights> experts_;
  std::vector<std::span<const uint8_t>> sources_;  // what lies in the caller's memory, until it is frozen
  std::vector<MappedGuard> guards_;                // of all that, from then on
  std::array<std::array<int64_t, 2>, kNumMatrices> part_bytes_{};  // of weights and scales, as first added
  bool is_uniform_ = true;                                         // all experts have parts of those sizes
  State state_ = State::kBuilding;
  Error closed_;  // what callers are told then
  mutable std::shared_mutex
      use_;  // shared: reading. Exclusive: changing experts_, arena_, residency_, state_, closed_.

  mutable std::mutex stats_mutex_;
  StoreStats stats_;
};

}  // namespace hmoe
