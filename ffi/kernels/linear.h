// Activations times one matrix: the dense projections of a model on the CPU.
#pragma once

#include <cstdint>

#include "kernels/matrix.h"
#include "kernels/table.h"
#include "machine/pool.h"

namespace hmoe {

// out [num_tokens, matrix.rows] = activations [num_tokens, matrix.cols] (bfloat16) times the matrix
// transposed.
void Linear(ThreadPool& pool, const CodecKernels& kernels, const Matrix& matrix, int64_t bytes_per_weight,
            const uint16_t* activations, int64_t num_tokens, float* out);

// Packs activations [num_tokens, cols] on the session's threads; returns a pointer to each packed vector.
// Both live in the session's scratch.
const uint8_t** PackTokens(ThreadPool::Session& session, const CodecKernels& kernels,
                           const uint16_t* activations, int64_t num_tokens, int64_t cols);

}  // namespace hmoe
