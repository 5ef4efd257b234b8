// Where the threads of a pool stand.
#pragma once

#include <thread>
#include <vector>

#include "machine/topology.h"

namespace hmoe {

struct ThreadPlace {
  int cpu;
  int node;               // counted from 0 among the nodes that have a thread
  int memory_node;        // the kernel's number
  std::vector<int> core;  // all hardware threads of the CPU's core
};

// Spreads the threads evenly over the nodes, because each node has memory channels of its own; within a node
// over the cores, and over second hardware threads only when every core of every node has one. More threads
// than CPUs begin again from the first.
std::vector<ThreadPlace> PlaceThreads(const Topology& topology, int num_threads);

// Best effort: without it a thread is slower, not wrong.
void Pin(std::thread& thread, int cpu);

}  // namespace hmoe
