// The expert lane as Python names it; the registry owns it.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include "python/check.h"
#include "python/expert_store.h"
#include "store/registry.h"

namespace hmoe {

template <typename T>
using PyRows = nanobind::ndarray<T, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

class PyExpertLane {
 public:
  PyExpertLane(PyExpertStore& store, int num_slots, int64_t patience_ms)
      : id_(Lanes().Add(Check(ExpertLane::Create(Check(Stores().Find(store.id())), num_slots,
                                                 std::chrono::milliseconds(patience_ms))))) {}
  ~PyExpertLane() { Close(); }
  PyExpertLane(const PyExpertLane&) = delete;
  PyExpertLane& operator=(const PyExpertLane&) = delete;

  // `hidden` holds the bits of bfloat16.
  int32_t Submit(int64_t slot, int64_t layer, const PyRows<const uint16_t>& hidden,
                 const PyRows<const int32_t>& ids, const PyRows<const float>& weights) {
    const auto lane = Find();
    const auto expect = [](const char* name, const auto& array, size_t rows, size_t cols) {
      if (array.shape(0) == rows && array.shape(1) == cols) return;
      Check(Fail(name, ": expected shape [", rows, ", ", cols, "], got [", array.shape(0), ", ",
                 array.shape(1), "]"));
    };
    expect("hidden", hidden, hidden.shape(0), static_cast<size_t>(lane->store()->shape().hidden));
    expect("ids", ids, hidden.shape(0), ids.shape(1));
    expect("weights", weights, hidden.shape(0), ids.shape(1));
    const Routing routing{ids.data(), weights.data(), static_cast<int64_t>(hidden.shape(0)),
                          static_cast<int64_t>(ids.shape(1))};
    auto ticket = [&] {
      const nanobind::gil_scoped_release unlocked;
      return lane->Submit(slot, layer, hidden.data(), routing);
    }();
    return Check(std::move(ticket));
  }

  void Wait(int64_t slot, int32_t ticket, const PyRows<float>& out) {
    const auto lane = Find();
    if (static_cast<int64_t>(out.shape(1)) != lane->store()->shape().hidden) {
      Check(Fail("out: expected ", lane->store()->shape().hidden, " columns, got ", out.shape(1)));
    }
    const Status done = [&] {
      const nanobind::gil_scoped_release unlocked;
      return lane->Wait(slot, ticket, static_cast<int64_t>(out.shape(0)), out.data());
    }();
    Check(done);
  }

  bool IsDone(int64_t slot, int32_t ticket) { return Check(Find()->IsDone(slot, ticket)); }

  // Raises what failed on a GPU's stream.
  void CheckFailure() { Check(Find()->TakeFailure()); }

  double BusySeconds() const { return std::chrono::duration<double>(Find()->busy()).count(); }
  double WaitedSeconds() const { return std::chrono::duration<double>(Find()->waited()).count(); }

  // (slot, layer, submitted, begun, done, awaited, fetched) of each.
  std::vector<std::array<int64_t, 7>> Jobs() const {
    std::vector<std::array<int64_t, 7>> rows;
    for (const JobTimes& job : Find()->Jobs()) {
      rows.push_back({job.slot, job.layer, job.submitted, job.begun, job.done, job.awaited, job.fetched});
    }
    return rows;
  }

  // The thread ends when the last call that uses it has returned.
  void Close() {
    const nanobind::gil_scoped_release unlocked;
    Lanes().Remove(id_);
  }

  int64_t id() const { return id_; }

 private:
  std::shared_ptr<ExpertLane> Find() const { return Check(Lanes().Find(id_)); }

  const int64_t id_;
};

}  // namespace hmoe
