// Exponential moving average on the CPU: chunks shared out over threads by their elements.
#include "cpu/ema.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "ema_arguments.h"

#define SK_KERNEL "cpu/ema_kernel.h"
#include "cpu/foreach_isa.h"

namespace smart_kernels {
namespace {

constexpr int64_t kGrain = 32768;  // elements that are worth a thread of their own

void ema_update_chunks(
    const Tensor& table, int64_t, double decay, const std::optional<Tensor>& decay_tensor,
    const std::optional<Tensor>& seed) {
  check_arguments(table, decay_tensor, seed);
  const int64_t n = table.size(1);
  if (n == 0) return;
  const auto* columns = static_cast<const int64_t*>(table.const_data_ptr());
  EmaJob job{{columns, columns + n, columns + 2 * n, columns + 3 * n, columns + 4 * n, columns + 5 * n, columns + 6 * n},
             decay, seed.has_value(), 0};
  if (decay_tensor) {
    const void* data = decay_tensor->const_data_ptr();
    job.decay = decay_tensor->scalar_type() == ScalarType::Double ? *static_cast<const double*>(data)
                                                                  : *static_cast<const float*>(data);
  }
  if (seed) job.seed = *static_cast<const uint64_t*>(seed->const_data_ptr());
  if (job.decay == 1) return;  // e stays, whatever p holds
  const int64_t* start = job.chunks.start;
  const auto kernel = SK_DISPATCH(ema_chunks);
  torch::stable::parallel_for(0, start[n - 1] + job.chunks.count[n - 1], kGrain, [&](int64_t begin, int64_t end) {
    const auto first_from = [&](int64_t element) { return std::lower_bound(start, start + n, element) - start; };
    kernel(job, first_from(begin), first_from(end));
  });
}

}  // namespace
}  // namespace smart_kernels

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CPU, m) {
  m.impl("ema_update_chunks", TORCH_BOX(&smart_kernels::ema_update_chunks));
}
