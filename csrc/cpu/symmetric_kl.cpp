// Symmetric KL on the CPU: the three ops, on one kernel that does a range of rows.
#include "cpu/symmetric_kl.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <optional>
#include <tuple>

#include "cpu/tensors.h"

#define SK_KERNEL "cpu/symmetric_kl_kernel.h"
#include "cpu/foreach_isa.h"

namespace smart_kernels {
namespace {

enum Reduction : int64_t { kNone, kSum, kMean, kBatchMean };  // as numbered in reference.py
constexpr int64_t kGrain = 16384;  // elements that are worth a thread of their own
constexpr int64_t kLaneRows = 16;  // rows done at once where they are short

using Weight = std::optional<Tensor>;

const void* data_or_null(const Weight& x) { return x ? x->const_data_ptr() : nullptr; }

ScalarType compute_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

double entry(const void* x, ScalarType dtype, int64_t i) {
  return dtype == ScalarType::Double ? static_cast<const double*>(x)[i] : static_cast<const float*>(x)[i];
}

// What the sum over rows is multiplied by: 1 / size(0), or 1 / the sum of weights
double normaliser(const Tensor& input, const Weight& weight, int64_t rows, int64_t reduction) {
  if (reduction == kBatchMean) return 1.0 / static_cast<double>(input.size(0));
  if (reduction != kMean) return 1.0;
  if (!weight) return 1.0 / static_cast<double>(rows);
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) total += entry(weight->const_data_ptr(), weight->scalar_type(), i);
  return 1.0 / total;
}

SymmetricKLJob make_job(const Tensor& input, const Tensor& target, const Weight& weight, int64_t reduction, bool detach) {
  SymmetricKLJob job{Rows(input), Rows(target), data_or_null(weight), nullptr, false, 1.0, detach, nullptr, nullptr, nullptr};
  STD_TORCH_CHECK(
      job.a.rows() == job.b.rows() && job.a.cols() == job.b.cols(), "symmetric_kl: input and target differ in shape");
  STD_TORCH_CHECK(
      !weight || (weight->numel() == job.a.rows() && weight->is_contiguous() &&
                  weight->scalar_type() == compute_dtype(input)),
      "symmetric_kl: weight must be contiguous, one per row, in the dtype of the arithmetic");
  job.scale = normaliser(input, weight, job.a.rows(), reduction);
  return job;
}

void run(const SymmetricKLJob& job) {
  const int64_t rows = job.a.rows(), grain = std::max<int64_t>(1, kGrain / job.a.cols());
  const auto kernel = SK_DISPATCH(symmetric_kl_rows);
  if (rows <= grain) {
    kernel(job, 0, rows);
    return;
  }
  const int64_t groups = (rows + kLaneRows - 1) / kLaneRows;
  if (job.a.cols() * kLaneRows <= kGrain)
    torch::stable::parallel_for(0, groups, grain / kLaneRows, [&](int64_t begin, int64_t end) {
      kernel(job, begin * kLaneRows, std::min(end * kLaneRows, rows));
    });
  else
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

// Runs the job with the losses wanted, and reduces them: in order and in double, whatever the number of threads.
Tensor run_with_loss(SymmetricKLJob& job, const Tensor& input, const Weight& weight, int64_t reduction) {
  const ScalarType dtype = compute_dtype(input);
  const int64_t rows = job.a.rows();
  Tensor losses = reduction == kNone ? empty_cpu(input.sizes().data(), input.dim() - 1, dtype) : empty_cpu({rows}, dtype);
  job.losses = losses.mutable_data_ptr();
  run(job);
  const auto weighted = [&](int64_t i) {  // a row of weight 0 has loss 0
    const double loss = entry(job.losses, dtype, i);
    return job.weight ? loss * entry(job.weight, dtype, i) : loss;
  };
  const auto put = [&](void* out, int64_t i, double x) {
    if (dtype == ScalarType::Double) static_cast<double*>(out)[i] = x;
    else static_cast<float*>(out)[i] = static_cast<float>(x);
  };
  if (reduction == kNone) {
    if (job.weight)
      for (int64_t i = 0; i < rows; ++i) put(job.losses, i, weighted(i));
    return losses;
  }
  double sum = 0;
  for (int64_t i = 0; i < rows; ++i) sum += weighted(i);
  Tensor loss = empty_cpu({}, dtype);
  put(loss.mutable_data_ptr(), 0, sum * job.scale);
  return loss;
}

Tensor forward(Tensor input, Tensor target, Weight weight, int64_t reduction, bool detach) {
  SymmetricKLJob job = make_job(input, target, weight, reduction, detach);
  return run_with_loss(job, input, weight, reduction);
}

// Allocates the gradients that are wanted
std::tuple<Tensor, Tensor> make_grads(SymmetricKLJob& job, const Tensor& input, const Tensor& target, bool input_grad, bool target_grad) {
  Tensor grad_a = input_grad ? empty_cpu_like(input) : empty_cpu({0}, input.scalar_type());
  Tensor grad_b = target_grad ? empty_cpu_like(target) : empty_cpu({0}, target.scalar_type());
  if (input_grad) job.grad_a = grad_a.mutable_data_ptr();
  if (target_grad) job.grad_b = grad_b.mutable_data_ptr();
  return {grad_a, grad_b};
}

std::tuple<Tensor, Tensor> backward(
    std::optional<Tensor> grad_output, Tensor input, Tensor target, Weight weight, int64_t reduction, bool detach,
    bool input_grad, bool target_grad) {
  SymmetricKLJob job = make_job(input, target, weight, reduction, detach);
  Tensor upstream;
  if (grad_output) {
    upstream = torch::stable::contiguous(*grad_output);
    job.upstream_rows = reduction == kNone;
    STD_TORCH_CHECK(
        upstream.scalar_type() == compute_dtype(input) && upstream.numel() == (job.upstream_rows ? job.a.rows() : 1),
        "symmetric_kl_backward: grad_output must have the shape and dtype of the loss");
    job.upstream = upstream.const_data_ptr();
  }
  auto grads = make_grads(job, input, target, input_grad, target_grad);
  run(job);
  return grads;
}

std::tuple<Tensor, Tensor, Tensor> forward_backward(
    Tensor input, Tensor target, Weight weight, int64_t reduction, bool detach, bool input_grad, bool target_grad) {
  SymmetricKLJob job = make_job(input, target, weight, reduction, detach);
  auto [grad_a, grad_b] = make_grads(job, input, target, input_grad, target_grad);
  return {run_with_loss(job, input, weight, reduction), grad_a, grad_b};
}

}  // namespace
}  // namespace smart_kernels

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CPU, m) {
  m.impl("symmetric_kl", TORCH_BOX(&smart_kernels::forward));
  m.impl("symmetric_kl_backward", TORCH_BOX(&smart_kernels::backward));
  m.impl("symmetric_kl_forward_backward", TORCH_BOX(&smart_kernels::forward_backward));
}
