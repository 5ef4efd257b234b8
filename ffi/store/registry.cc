#include "store/registry.h"

namespace hmoe {

// Never destroyed: a call may still run while the program's static objects are.
Registry<ExpertStore>& Stores() {
  static auto* stores = new Registry<ExpertStore>("expert store");
  return *stores;
}

Registry<Compute>& Pools() {
  static auto* pools = new Registry<Compute>("thread pool");
  return *pools;
}

Registry<ExpertLane>& Lanes() {
  static auto* lanes = new Registry<ExpertLane>("expert lane");
  return *lanes;
}

}  // namespace hmoe
