// One weight matrix as a checkpoint stores it: [rows, cols], row-major, its scales beside it.
#pragma once

#include <cstdint>

namespace hmoe {

// Both pointers may have any alignment: tensors in a safetensors file start at any byte.
struct Matrix {
  const uint8_t* weights = nullptr;
  const uint8_t* scales = nullptr;  // null for codecs without scales
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t rows_per_scale = 1;    // rows that share scales: 1, 128, or all
  bool scales_are_bf16 = false;  // of whole rows, where float32 is the other choice
};

}  // namespace hmoe
