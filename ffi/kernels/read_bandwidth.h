// The roofline: how fast this machine reads memory, measured with the pool that the kernels use.
#pragma once

#include <cstdint>

#include "base/result.h"
#include "kernels/compute.h"

namespace hmoe {

// GB/s (1e9 bytes) of plain loads over a fresh buffer; the best of several passes. The buffer has to be much
// larger than the caches.
Result<double> ReadBandwidth(Compute& compute, int64_t megabytes);

}  // namespace hmoe
