// One weight matrix as a checkpoint stores it: [rows, cols], row-major, scales of 128 x 128 blocks beside it.
#pragma once

#include <cstdint>

namespace hmoe {

// Both pointers may have any alignment: tensors in a safetensors file start at any byte.
struct Matrix {
  const uint8_t* weights = nullptr;
  const uint8_t* scales = nullptr;  // floats; null for codecs without scales
  int64_t rows = 0;
  int64_t cols = 0;
};

}  // namespace hmoe
