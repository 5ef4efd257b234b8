// Where every routed expert's weights lie: (layer, expert, matrix) -> address, in the checkpoint's own
// layout.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <span>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "codec/codec.h"
#include "kernels/compute.h"
#include "kernels/matrix.h"

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

struct StoreStats {
  int64_t calls = 0;
  int64_t bytes = 0;  // of weights and scales, each expert once per call
  double seconds = 0;
};

// Built by one thread (Add, then Freeze), read by any. It does not own the memory that it points to: the
// caller of Add keeps it until Close has returned.
class ExpertStore {
 public:
  static Result<std::shared_ptr<ExpertStore>> Create(std::shared_ptr<Compute> compute, const Codec& codec,
                                                     const StoreShape& shape);

  Status Add(int64_t layer, int64_t expert, MatrixName name, std::span<const uint8_t> weights,
             std::span<const uint8_t> scales, ScaleType scale_type);

  // Refuses a store with holes, and names the first.
  Status Freeze();

  // Waits for the readings in progress. Later readings fail with `error`.
  void Close(Error error);

  // Holds the store open. Fails when it is closed or not frozen.
  using Reading = std::shared_lock<std::shared_mutex>;
  Result<Reading> Read() const;

  const ExpertWeights& Expert(int64_t layer, int64_t expert) const {  // while reading
    return experts_[static_cast<size_t>(layer * shape_.experts + expert)];
  }
  const StoreShape& shape() const { return shape_; }
  const Codec& codec() const { return codec_; }
  const Isa& isa() const { return compute_->isa; }
  ThreadPool& pool() const { return *compute_->pool; }

  void CountCall(int64_t experts_read, double seconds);
  StoreStats stats() const;
  void ResetStats();

 private:
  enum class State { kBuilding, kFrozen, kClosed };

  ExpertStore(std::shared_ptr<Compute> compute, const Codec& codec, const StoreShape& shape);

  const std::shared_ptr<Compute> compute_;
  const Codec codec_;
  const StoreShape shape_;
  int64_t added_bytes_ = 0;  // of all experts, weights and scales
  std::vector<ExpertWeights> experts_;
  State state_ = State::kBuilding;
  Error closed_;                   // what callers are told then
  mutable std::shared_mutex use_;  // shared: reading. Exclusive: changing experts_, state_ or closed_.

  mutable std::mutex stats_mutex_;
  StoreStats stats_;
};

}  // namespace hmoe
