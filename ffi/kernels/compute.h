// Who computes: the threads, and the instruction set that they use.
#pragma once

#include "kernels/isa.h"
#include "machine/pool.h"

namespace hmoe {

struct Compute {
  Compute(int num_threads, const Isa& chosen) : pool(num_threads), isa(chosen) {}

  ThreadPool pool;
  const Isa& isa;
};

}  // namespace hmoe
