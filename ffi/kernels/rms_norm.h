// Root-mean-square normalisation of rows.
#pragma once

#include <cstdint>

namespace hmoe {

// out [rows, cols] = x [rows, cols] / rms(row) * weight [cols], all bfloat16: computed in FP32, rounded at
// the end. A row's bits depend on nothing but the row.
void RmsNorm(const uint16_t* x, const uint16_t* weight, int64_t rows, int64_t cols, float eps, uint16_t* out);

}  // namespace hmoe
