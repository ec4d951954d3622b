// What the launchers of both devices check of their arguments: all that they read themselves.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "ema_chunks.h"

namespace smart_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_arguments(
    const Tensor& table, const std::optional<Tensor>& decay, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(
      table.scalar_type() == ScalarType::Long && table.dim() == 2 && table.size(0) == kColumns && table.is_contiguous(),
      "ema_update_chunks: expected a table as made by ops/_chunks.py");
  STD_TORCH_CHECK(
      !decay || ((decay->scalar_type() == ScalarType::Float || decay->scalar_type() == ScalarType::Double) &&
                 decay->numel() == 1 && decay->device() == table.device()),
      "ema_update_: expected decay_tensor to be one number in float32 or float64 on the shadows' device");
  STD_TORCH_CHECK(
      !seed || (seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && seed->device() == table.device()),
      "ema_update_: expected seed to be one number in int64 on the shadows' device");
}

}  // namespace smart_kernels
