#include "machine/topology.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "machine/cgroup.h"
#include "machine/cpu_list.h"

namespace hmoe {
namespace {

// Empty for a file that is not there or says something else.
std::vector<int> ReadCpuList(const std::string& path) {
  std::string line;
  std::getline(std::ifstream(path) >> std::ws, line);
  line.erase(line.find_last_not_of(" \n") + 1);
  Result<std::vector<int>> cpus = ParseCpuList(line);
  return cpus.ok() ? std::move(cpus).value() : std::vector<int>();
}

// The kernel's node of each CPU. Nodes may have holes in their numbering, or memory and no CPUs.
std::map<int, int> NodeOfCpu(const std::string& root) {
  std::map<int, int> node_of;
  std::error_code unreadable;
  for (const auto& entry :
       std::filesystem::directory_iterator(root + "/sys/devices/system/node", unreadable)) {
    const std::string name = entry.path().filename();
    if (!name.starts_with("node") || name.find_first_not_of("0123456789", 4) != std::string::npos) continue;
    for (const int cpu : ReadCpuList(entry.path() / "cpulist")) node_of[cpu] = std::stoi(name.substr(4));
  }
  return node_of;
}

int NodeOr(const std::map<int, int>& node_of, int cpu, int otherwise) {
  const auto found = node_of.find(cpu);
  return found == node_of.end() ? otherwise : found->second;
}

Core CoreOf(const std::string& root, int cpu, const std::set<int>& allowed) {
  Core core;
  const std::string folder = root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
  for (const int sibling : ReadCpuList(folder + "thread_siblings_list")) {
    if (allowed.contains(sibling)) core.cpus.push_back(sibling);
  }
  // A list that leaves out the CPU itself says nothing about it.
  if (std::find(core.cpus.begin(), core.cpus.end(), cpu) == core.cpus.end()) core.cpus = {cpu};
  return core;
}

}  // namespace

int Topology::num_cores() const {
  size_t cores = 0;
  for (const Node& node : nodes) cores += node.cores.size();
  return static_cast<int>(cores);
}

int Topology::num_cpus() const {
  size_t cpus = 0;
  for (const Node& node : nodes) {
    for (const Core& core : node.cores) cpus += core.cpus.size();
  }
  return static_cast<int>(cpus);
}

std::vector<int> AllowedCpus() {
  std::vector<int> cpus;
  // The kernel refuses a set smaller than its own, which may be larger than cpu_set_t.
  for (int size = CPU_SETSIZE; size <= 1 << 20; size *= 2) {
    cpu_set_t* set = CPU_ALLOC(size);
    const size_t bytes = CPU_ALLOC_SIZE(size);
    const bool read = sched_getaffinity(0, bytes, set) == 0;
    const bool too_small = !read && errno == EINVAL;
    for (int cpu = 0; read && cpu < size; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, set)) cpus.push_back(cpu);
    }
    CPU_FREE(set);
    if (!too_small) break;
  }
  return cpus;
}

Topology ReadTopology(const std::string& root, const std::vector<int>& allowed) {
  const std::map<int, int> node_of = NodeOfCpu(root);
  const std::set<int> all(allowed.begin(), allowed.end());
  std::map<int, Node> nodes;
  std::set<int> taken;
  for (const int cpu : all) {
    if (taken.contains(cpu)) continue;
    const int memory_node = NodeOr(node_of, cpu, node_of.empty() ? kNoMemoryNode : node_of.begin()->second);
    const Core core = CoreOf(root, cpu, all);
    taken.insert(core.cpus.begin(), core.cpus.end());
    nodes[memory_node].memory_node = memory_node;
    nodes[memory_node].cores.push_back(core);
  }
  Topology topology;
  topology.quota_cpus = QuotaCpus(root, Topology::kNoQuota);
  for (auto& [number, node] : nodes) topology.nodes.push_back(std::move(node));
  if (topology.nodes.empty()) topology.nodes.push_back({kNoMemoryNode, {{{0}}}});
  return topology;
}

Topology DetectTopology() { return ReadTopology("", AllowedCpus()); }

Result<Topology> FindTopology(std::string_view text) {
  if (text == "auto") return DetectTopology();
  const std::map<int, int> node_of = NodeOfCpu("");
  Topology topology;
  for (bool more = true; more;) {
    const size_t end = text.find(';');
    more = end != std::string_view::npos;
    const auto cpus = ParseCpuList(text.substr(0, end));
    if (!cpus.ok()) return Fail("topology: ", cpus.error().message, ", or \"auto\"");
    if (cpus.value().empty()) {
      return Fail("topology: expected \"auto\" or nodes with CPUs like \"0-3;4-7\", got a node without CPUs");
    }
    Node node{NodeOr(node_of, cpus.value().front(), kNoMemoryNode), {}};
    for (const int cpu : cpus.value()) node.cores.push_back({{cpu}});
    topology.nodes.push_back(std::move(node));
    if (more) text.remove_prefix(end + 1);
  }
  return topology;
}

// By default one thread per physical core. XLA needs no core beside them: the thread that calls the pool is
// XLA's own and is one of the pool's, and XLA's other threads have nothing to do while it waits for the call.
// The engine's Python threads wait for the step too. A second hardware thread per core would read no more
// memory per second, and halve the caches that each has.
Result<int> ResolveNumThreads(const Topology& topology, std::optional<int> asked) {
  if (!asked) return std::min(topology.num_cores(), topology.quota_cpus);
  if (*asked < 1 || *asked > topology.num_cpus()) {
    return Fail("num_threads: expected 1 <= num_threads <= ", topology.num_cpus(),
                ", the CPUs of this process, got ", *asked);
  }
  return *asked;
}

std::string TopologyText(const Topology& topology) {
  std::string text;
  for (const Node& node : topology.nodes) {
    std::vector<int> cpus;
    for (const Core& core : node.cores) cpus.push_back(core.cpus.front());
    if (!text.empty()) text += ';';
    text += CpuListText(cpus);
  }
  return text;
}

}  // namespace hmoe
