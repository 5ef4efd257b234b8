// Which CPUs this process may compute on, and which memory is near to them.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace hmoe {

// The hardware threads of one physical core. One of them fills the core's share of the memory bandwidth, so
// the first is used before the second of any other core.
struct Core {
  std::vector<int> cpus;
};

inline constexpr int kNoMemoryNode = -1;

struct Node {
  int memory_node = kNoMemoryNode;  // the kernel's number, for page placement
  std::vector<Core> cores;
};

// At least one node, every node with at least one core, every core with at least one CPU.
struct Topology {
  static constexpr int kNoQuota = 1 << 30;

  std::vector<Node> nodes;
  int quota_cpus = kNoQuota;  // whole CPUs that the cgroup quota pays for, at least one

  int num_cores() const;
  int num_cpus() const;
};

// The CPUs on which the calling thread may run.
std::vector<int> AllowedCpus();

// What the kernel says below `root`/sys and `root`/proc about the allowed CPUs; `root` is empty but for
// tests. Never fails: what is not said is taken to be one node, one hardware thread per core and no quota.
Topology ReadTopology(const std::string& root, const std::vector<int>& allowed);

// What this machine has and the calling thread may use.
Topology DetectTopology();

// "auto" is DetectTopology. Otherwise the nodes as declared, in the kernel's notation for sets of CPUs
// with a semicolon between nodes: "0-3;4-7". Every CPU counts as a core. It may be named several times, and
// need not exist, so that a machine can stand in for a larger one. Neither affinity nor a quota limits it.
Result<Topology> FindTopology(std::string_view text);

// How many threads a pool gets: as asked, or as many as suit the topology. Refuses more than it has CPUs:
// threads that share a CPU wait for each other at every barrier.
Result<int> ResolveNumThreads(const Topology& topology, std::optional<int> asked);

// "0-3;4-7": the first hardware threads of each node's cores.
std::string TopologyText(const Topology& topology);

}  // namespace hmoe
