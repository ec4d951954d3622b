// Exponential moving average on CUDA: one launch for all chunks.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <limits>

#include "cuda/ema_kernel.cuh"
#include "ema_arguments.h"

namespace smart_kernels {
namespace {

void ema_update_chunks(
    const Tensor& table, int64_t, double decay, const std::optional<Tensor>& decay_tensor,
    const std::optional<Tensor>& seed) {
  check_arguments(table, decay_tensor, seed);
  const int64_t n = table.size(1);
  if (n == 0) return;
  STD_TORCH_CHECK(n <= std::numeric_limits<int32_t>::max(), "ema_update_chunks: ", n, " chunks are too many for a grid");
  const auto* columns = static_cast<const int64_t*>(table.const_data_ptr());
  const EmaChunks chunks{columns,         columns + n,     columns + 2 * n, columns + 3 * n,
                         columns + 4 * n, columns + 5 * n, columns + 6 * n};
  const int32_t device = table.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto kernel = seed ? ema_update_kernel<true> : ema_update_kernel<false>;
  kernel<<<static_cast<unsigned>(n), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      chunks, decay, decay_tensor ? decay_tensor->const_data_ptr() : nullptr,
      decay_tensor && decay_tensor->scalar_type() == ScalarType::Double,
      seed ? static_cast<const uint64_t*>(seed->const_data_ptr()) : nullptr);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace smart_kernels

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CUDA, m) {
  m.impl("ema_update_chunks", TORCH_BOX(&smart_kernels::ema_update_chunks));
}
