// The few tensor calls that the CPU kernels make, on the C shim: an allocation through the dispatcher costs
// as much as the smallest kernels here.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <initializer_list>

#include "cpu/blocks.h"

namespace smart_kernels {

inline int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    default: STD_TORCH_CHECK(false, "smart_kernels: expected a floating dtype"); return -1;
  }
}

inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// A contiguous CPU tensor, not initialised
inline Tensor empty_cpu(const int64_t* sizes, int64_t dim, ScalarType dtype) {
  int64_t strides[16], bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_code(dtype)));
  bool too_many = false;  // which torch refuses
  STD_TORCH_CHECK(dim <= 16, "smart_kernels: tensors of more than 16 dimensions are not supported");
  for (int64_t d = dim, stride = 1; d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
    too_many |= __builtin_mul_overflow(bytes, sizes[d], &bytes);
  }
  if (bytes >= kLargeBytes && !too_many) return empty_large(sizes, strides, dim, dtype, bytes);
  return empty_strided(sizes, strides, dim, dtype_code(dtype));
}
inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_cpu(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}
inline Tensor empty_cpu_like(const Tensor& x) { return empty_cpu(x.sizes().data(), x.dim(), x.scalar_type()); }

}  // namespace smart_kernels
