// The few tensor calls that the CPU kernels make, on the C shim: an allocation through the dispatcher costs
// as much as the smallest kernels here.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace smart_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    default: STD_TORCH_CHECK(false, "smart_kernels: expected a floating dtype"); return -1;
  }
}

// Large blocks come fresh from the system, and the first touch of each of their pages is a fault: with pages of 4 KiB
// the faults of a gradient of 32 MiB take longer than its computation. Asks for pages of 2 MiB inside the block.
inline void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: may be refused
#endif
}

// A contiguous CPU tensor, not initialised
inline Tensor empty_cpu(const int64_t* sizes, int64_t dim, ScalarType dtype) {
  int64_t strides[16], numel = 1;
  STD_TORCH_CHECK(dim <= 16, "smart_kernels: tensors of more than 16 dimensions are not supported");
  for (int64_t d = dim, stride = 1; d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
    numel *= sizes[d];
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, dtype_code(dtype), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  if (const int64_t bytes = numel * static_cast<int64_t>(tensor.element_size()); bytes >= 4 << 20)
    ask_for_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}
inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_cpu(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}
inline Tensor empty_cpu_like(const Tensor& x) { return empty_cpu(x.sizes().data(), x.dim(), x.scalar_type()); }

}  // namespace smart_kernels
