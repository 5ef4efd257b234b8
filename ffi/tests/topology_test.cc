#include "machine/topology.h"

#include <numeric>

#include "machine/cgroup.h"
#include "machine/cpu_list.h"
#include "machine/places.h"
#include "tests/check.h"
#include "tests/temporary_tree.h"

namespace hmoe {
namespace {

using test::TemporaryTree;

std::vector<int> Range(int begin, int end) {
  std::vector<int> numbers(static_cast<size_t>(end - begin));
  std::iota(numbers.begin(), numbers.end(), begin);
  return numbers;
}

void WriteNode(const TemporaryTree& tree, int node, const std::string& cpus) {
  tree.Write("/sys/devices/system/node/node" + std::to_string(node) + "/cpulist", cpus + "\n");
}

void WriteSiblings(const TemporaryTree& tree, int cpu, const std::string& siblings) {
  tree.Write("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list",
             siblings + "\n");
}

// Two sockets of 64 cores; core c has the hardware threads c and c + 128.
void WriteTwoSockets(const TemporaryTree& tree) {
  WriteNode(tree, 0, "0-63,128-191");
  WriteNode(tree, 1, "64-127,192-255");
  tree.Write("/sys/devices/system/node/online", "0-1\n");  // not a node
  for (int cpu = 0; cpu < 256; ++cpu) {
    WriteSiblings(tree, cpu, std::to_string(cpu % 128) + "," + std::to_string(cpu % 128 + 128));
  }
}

std::string PlacesText(const Topology& topology, int num_threads) {
  std::string text;
  for (const ThreadPlace& place : PlaceThreads(topology, num_threads)) {
    text += std::to_string(place.node) + ':' + std::to_string(place.cpu) + ' ';
  }
  return text;
}

void TestTwoSocketsWithTwoThreadsPerCore() {
  const TemporaryTree tree;
  WriteTwoSockets(tree);
  const Topology topology = ReadTopology(tree.root(), Range(0, 256));
  CHECK_EQ(TopologyText(topology), "0-63;64-127");
  CHECK_EQ(topology.nodes[1].memory_node, 1);
  CHECK_EQ(topology.num_cores(), 128);
  CHECK_EQ(topology.num_cpus(), 256);
  CHECK_EQ(ResolveNumThreads(topology, std::nullopt).value(), 128);
  CHECK_EQ(ResolveNumThreads(topology, 256).value(), 256);
  CHECK_EQ(ResolveNumThreads(topology, 257).error().message,
           "num_threads: expected 1 <= num_threads <= 256, the CPUs of this process, got 257");
  CHECK_EQ(ResolveNumThreads(topology, 0).error().message,
           "num_threads: expected 1 <= num_threads <= 256, the CPUs of this process, got 0");
}

void TestThreadsAreSpreadOverNodesThenCoresThenSiblings() {
  const TemporaryTree tree;
  WriteTwoSockets(tree);
  const Topology topology = ReadTopology(tree.root(), {0, 1, 64, 65, 66, 128, 129, 194});
  CHECK_EQ(TopologyText(topology), "0-1;64-66");
  CHECK_EQ(PlacesText(topology, 1), "0:0 ");
  CHECK_EQ(PlacesText(topology, 3), "0:0 1:64 0:1 ");
  CHECK_EQ(PlacesText(topology, 8), "0:0 1:64 0:1 1:65 1:66 0:128 0:129 1:194 ");
  CHECK_EQ(PlacesText(topology, 10), "0:0 1:64 0:1 1:65 1:66 0:128 0:129 1:194 0:0 1:64 ");
}

void TestAffinityLeavesOutCpus() {
  const TemporaryTree tree;
  WriteTwoSockets(tree);
  // Core 2 by its second thread, a CPU of the other socket, and one that the kernel's lists do not name.
  const Topology topology = ReadTopology(tree.root(), {0, 128, 130, 200, 999});
  CHECK_EQ(TopologyText(topology), "0,130,999;200");
  CHECK_EQ(topology.num_cpus(), 5);
}

void TestHolesInTheNumbersOfNodesAndCpus() {
  const TemporaryTree tree;
  WriteNode(tree, 2, "1,5");  // CPU 3 is offline: it is in no list, and has no siblings
  WriteNode(tree, 7, "9");
  WriteNode(tree, 8, "");  // memory without CPUs
  WriteSiblings(tree, 1, "1,3");
  const Topology topology = ReadTopology(tree.root(), {1, 5, 9});
  CHECK_EQ(TopologyText(topology), "1,5;9");
  CHECK_EQ(topology.nodes[0].memory_node, 2);
  CHECK_EQ(topology.nodes[1].memory_node, 7);
}

void TestOneCpu() {
  const TemporaryTree tree;
  WriteNode(tree, 0, "0");
  CHECK_EQ(TopologyText(ReadTopology(tree.root(), {0})), "0");
}

void TestAMachineThatSaysNothing() {
  const TemporaryTree tree;
  const Topology topology = ReadTopology(tree.root(), {0, 1, 2});
  CHECK_EQ(TopologyText(topology), "0-2");
  CHECK_EQ(topology.nodes[0].memory_node, kNoMemoryNode);
  CHECK_EQ(topology.quota_cpus, Topology::kNoQuota);
  CHECK_EQ(TopologyText(ReadTopology(tree.root(), {})), "0");
}

void TestThisMachineIsRead() {
  const Topology topology = DetectTopology();
  CHECK_EQ(topology.num_cpus(), std::ssize(AllowedCpus()));
  CHECK(topology.num_cores() <= topology.num_cpus());
}

void TestDeclaredNodes() {
  const Topology topology = FindTopology("0-1;4000,1,1").value();
  CHECK_EQ(topology.nodes.size(), 2u);
  CHECK_EQ(topology.num_cores(), 5);
  CHECK_EQ(topology.nodes[1].memory_node, kNoMemoryNode);
  CHECK_EQ(TopologyText(topology), "0-1;4000,1,1");
  const auto refusal = [](const char* text) { return FindTopology(text).error().message; };
  CHECK_EQ(refusal("0;;1"),
           "topology: expected \"auto\" or nodes with CPUs like \"0-3;4-7\", got a node without CPUs");
  CHECK_EQ(refusal("numa"), "topology: expected CPUs below 8192 like \"0-3,8\", got \"numa\", or \"auto\"");
  for (const char* wrong : {"", ";", "0;", "0,", ",0", "0-", "-1", "3-1", "0 1", "0-8192", "99999999999"}) {
    CHECK_CONTAINS(refusal(wrong), "topology: expected");
  }
}

void TestCpuListsAreWrittenAsTheyAreRead() {
  for (const char* text : {"", "0", "0-3", "0-3,8,10-11", "7,5,5"}) {
    CHECK_EQ(CpuListText(ParseCpuList(text).value()), text);
  }
}

// A process in /a/b of version 2.
void TestTheSmallestQuotaOfTheGroupAndItsParentsCounts() {
  const TemporaryTree tree;
  tree.Write("/proc/self/cgroup", "0::/a/b\n");
  tree.Write("/proc/self/mountinfo", "30 20 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n");
  CHECK_EQ(QuotaCpus(tree.root(), 99), 99);
  tree.Write("/sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
  CHECK_EQ(QuotaCpus(tree.root(), 99), 99);
  tree.Write("/sys/fs/cgroup/a/cpu.max", "350000 100000\n");
  CHECK_EQ(QuotaCpus(tree.root(), 99), 3);
  CHECK_EQ(QuotaCpus(tree.root(), 2), 2);
  tree.Write("/sys/fs/cgroup/a/b/cpu.max", "50000 100000\n");
  CHECK_EQ(QuotaCpus(tree.root(), 99), 1);
  tree.Write("/sys/fs/cgroup/a/b/cpu.max", "400000 100000\n");
  tree.Write("/sys/fs/cgroup/cpu.max", "200000 100000\n");
  CHECK_EQ(QuotaCpus(tree.root(), 99), 2);
}

// Version 1 beside a version 2 without controllers, in a container that sees its own group at the top.
void TestQuotasOfVersion1() {
  const TemporaryTree tree;
  tree.Write("/proc/self/cgroup", "5:cpuset:/\n1:cpu,cpuacct:/docker/x/inner\n0::/\n");
  tree.Write("/proc/self/mountinfo",
             "40 30 0:35 /docker/x /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
             "41 30 0:36 / /sys/fs/cgroup/cpuset ro - cgroup cgroup rw,cpuset\n"
             "42 30 0:37 / /sys/fs/cgroup/unified ro - cgroup2 cgroup2 rw\n");
  tree.Write("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
  tree.Write("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
  CHECK_EQ(QuotaCpus(tree.root(), 99), 99);
  tree.Write("/sys/fs/cgroup/cpu,cpuacct/inner/cpu.cfs_quota_us", "1200000\n");
  tree.Write("/sys/fs/cgroup/cpu,cpuacct/inner/cpu.cfs_period_us", "200000\n");
  CHECK_EQ(QuotaCpus(tree.root(), 99), 6);
  tree.Write("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "500000\n");
  CHECK_EQ(QuotaCpus(tree.root(), 99), 5);
}

void TestAutoStaysWithinTheQuota() {
  const TemporaryTree tree;
  WriteTwoSockets(tree);
  tree.Write("/proc/self/cgroup", "0::/\n");
  tree.Write("/proc/self/mountinfo", "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
  tree.Write("/sys/fs/cgroup/cpu.max", "1600000 100000\n");
  const Topology topology = ReadTopology(tree.root(), Range(0, 256));
  CHECK_EQ(ResolveNumThreads(topology, std::nullopt).value(), 16);
  CHECK_EQ(ResolveNumThreads(topology, 20).value(), 20);
}

}  // namespace
}  // namespace hmoe

int main() {
  hmoe::TestTwoSocketsWithTwoThreadsPerCore();
  hmoe::TestThreadsAreSpreadOverNodesThenCoresThenSiblings();
  hmoe::TestAffinityLeavesOutCpus();
  hmoe::TestHolesInTheNumbersOfNodesAndCpus();
  hmoe::TestOneCpu();
  hmoe::TestAMachineThatSaysNothing();
  hmoe::TestThisMachineIsRead();
  hmoe::TestDeclaredNodes();
  hmoe::TestCpuListsAreWrittenAsTheyAreRead();
  hmoe::TestTheSmallestQuotaOfTheGroupAndItsParentsCounts();
  hmoe::TestQuotasOfVersion1();
  hmoe::TestAutoStaysWithinTheQuota();
  return hmoe::test::failures;
}
