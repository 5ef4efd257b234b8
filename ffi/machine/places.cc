#include "machine/places.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <cstddef>

namespace hmoe {
namespace {

// For each node the places that are the `turn`-th hardware thread of their core.
std::vector<std::vector<ThreadPlace>> PlacesOfTurn(const Topology& topology, size_t turn) {
  std::vector<std::vector<ThreadPlace>> places(topology.nodes.size());
  for (size_t n = 0; n < places.size(); ++n) {
    const Node& node = topology.nodes[n];
    for (const Core& core : node.cores) {
      if (turn >= core.cpus.size()) continue;
      places[n].push_back({core.cpus[turn], static_cast<int>(n), node.memory_node, core.cpus});
    }
  }
  return places;
}

size_t NumTurns(const Topology& topology) {
  size_t turns = 1;
  for (const Node& node : topology.nodes) {
    for (const Core& core : node.cores) turns = std::max(turns, core.cpus.size());
  }
  return turns;
}

}  // namespace

std::vector<ThreadPlace> PlaceThreads(const Topology& topology, int num_threads) {
  const size_t wanted = static_cast<size_t>(num_threads), num_nodes = topology.nodes.size();
  std::vector<ThreadPlace> chosen;
  std::vector<size_t> threads_of(num_nodes, 0);
  for (size_t turn = 0; chosen.size() < wanted; turn = (turn + 1) % NumTurns(topology)) {
    const auto places = PlacesOfTurn(topology, turn);
    std::vector<size_t> taken(num_nodes, 0);
    while (chosen.size() < wanted) {
      size_t best = num_nodes;
      for (size_t n = 0; n < num_nodes; ++n) {
        if (taken[n] == places[n].size()) continue;
        if (best == num_nodes || threads_of[n] < threads_of[best]) best = n;
      }
      if (best == num_nodes) break;
      chosen.push_back(places[best][taken[best]++]);
      ++threads_of[best];
    }
  }
  return chosen;
}

void Pin(std::thread& thread, int cpu) {
  if (cpu >= CPU_SETSIZE) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
}

}  // namespace hmoe
