// The pools and stores that other languages name by small ids: an address cannot be checked, an id can.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>

#include "base/result.h"
#include "kernels/compute.h"
#include "kernels/expert_lane.h"
#include "store/expert_store.h"

namespace hmoe {

// Ids start at 1 and are never used again, so that an old id is known to be closed.
template <typename T>
class Registry {
 public:
  // `kind` names the objects in messages: "expert store".
  explicit Registry(const char* kind) : kind_(kind) {}

  int64_t Add(std::shared_ptr<T> object) {
    const std::unique_lock lock(mutex_);
    objects_.emplace(++last_id_, std::move(object));
    return last_id_;
  }

  void Remove(int64_t id) {
    std::shared_ptr<T> removed;  // dies after the lock is released
    const std::unique_lock lock(mutex_);
    if (auto found = objects_.find(id); found != objects_.end()) {
      removed = std::move(found->second);
      objects_.erase(found);
    }
  }

  Result<std::shared_ptr<T>> Find(int64_t id) const {
    const std::shared_lock lock(mutex_);
    if (auto found = objects_.find(id); found != objects_.end()) return found->second;
    if (id > 0 && id <= last_id_) return Closed(id);
    return Fail(kind_, " ", id, " does not exist");
  }

  Error Closed(int64_t id) const { return Fail(kind_, " ", id, " is closed"); }

 private:
  const char* const kind_;
  mutable std::shared_mutex mutex_;
  std::map<int64_t, std::shared_ptr<T>> objects_;
  int64_t last_id_ = 0;
};

Registry<ExpertStore>& Stores();
Registry<Compute>& Pools();
Registry<ExpertLane>& Lanes();

}  // namespace hmoe
