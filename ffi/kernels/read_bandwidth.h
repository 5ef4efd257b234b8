// The roofline: how fast this machine reads memory, measured with the pool that the kernels use.
#pragma once

#include <cstdint>

#include "base/result.h"
#include "kernels/compute.h"

namespace hmoe {

// GB/s (1e9 bytes) of loads over a fresh buffer by the pool's threads; the best of several passes, half of
// them plain and half with prefetches ahead: which of the two is faster depends on the machine, and a limit
// must not be a weak one. The loads are the widest that the machine has, whatever ISA the pool computes with.
// The buffer has to be much larger than the caches.
Result<double> ReadBandwidth(Compute& compute, int64_t megabytes);

}  // namespace hmoe
