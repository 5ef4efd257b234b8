// The other limit: how fast this machine multiplies and adds, measured with the pool that the kernels use.
#pragma once

#include "kernels/compute.h"

namespace hmoe {

// Multiply-adds per second of all the pool's threads at once, by the dot instruction of the pool's ISA with
// operands in registers; the best of several passes. Nothing that computes with this ISA can be faster.
double DotPeak(Compute& compute);

}  // namespace hmoe
