// Memory for large results, kept for the next of them when they are gone.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace smart_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLargeBytes = 128 << 10;  // from where on malloc turns to the system

// A contiguous CPU tensor of so many bytes, not initialised
Tensor empty_large(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype, int64_t bytes);

// Gives back all that is kept; returns how many bytes.
int64_t empty_cache();

}  // namespace smart_kernels
