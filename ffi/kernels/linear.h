// Activations times one matrix: the dense projections of a model on the CPU.
#pragma once

#include <cstdint>

#include "codec/codec.h"
#include "kernels/isa.h"
#include "kernels/matrix.h"
#include "machine/pool.h"

namespace hmoe {

// out [num_tokens, matrix.rows] = activations [num_tokens, matrix.cols] (bfloat16) times the matrix
// transposed.
void Linear(ThreadPool& pool, const Isa& isa, const Codec& codec, const Matrix& matrix,
            const uint16_t* activations, int64_t num_tokens, float* out);

}  // namespace hmoe
