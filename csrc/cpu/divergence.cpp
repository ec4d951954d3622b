// The divergences on the CPU: the ops, on one kernel that does a range of rows.
#include "cpu/divergence.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>

#include "cpu/cache.h"
#include "cpu/isa.h"
#include "cpu/tensors.h"

namespace smart_kernels {
namespace {

enum Reduction : int64_t { kNone, kSum, kMean, kBatchMean };  // as numbered in reference.py
constexpr int64_t kGrain = 4096;  // elements that are worth a thread of their own
constexpr int64_t kLaneRows = 16;  // rows done at once where they are short
constexpr int64_t kFewRows = 256;

using Weight = std::optional<Tensor>;

const void* data_or_null(const Weight& x) { return x ? x->const_data_ptr() : nullptr; }

ScalarType compute_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The sum of x_i (w_i) in double, in an order that no number of threads changes
template <typename T>
double sum_of(const void* x, const void* w, int64_t n) {
  const T *const values = static_cast<const T*>(x), *const factors = static_cast<const T*>(w);
  double partial[8] = {};
  for (int64_t i = 0; i < n; ++i) partial[i % 8] += factors ? double(values[i]) * factors[i] : values[i];
  double sum = 0;
  for (double p : partial) sum += p;
  return sum;
}
double sum_of(ScalarType dtype, const void* x, const void* w, int64_t n) {
  return dtype == ScalarType::Double ? sum_of<double>(x, w, n) : sum_of<float>(x, w, n);
}

template <typename T>
void scale_by(void* x, const void* w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) static_cast<T*>(x)[i] *= static_cast<const T*>(w)[i];
}

// What the sum over rows is multiplied by: 1 / size(0), or 1 / the sum of weights
double normaliser(const Tensor& input, const Weight& weight, int64_t rows, int64_t reduction) {
  if (reduction == kBatchMean) return 1.0 / static_cast<double>(input.size(0));
  if (reduction != kMean) return 1.0;
  if (!weight) return 1.0 / static_cast<double>(rows);
  return 1.0 / sum_of(weight->scalar_type(), weight->const_data_ptr(), nullptr, rows);
}

// Whether a row's exponentials wait for its second reading, or are made anew then. What does not fit in the second cache
// comes back from the third; that takes longer than to make them by vectors of 64 bytes, and less than by shorter ones.
// The logits of the next row are asked for meanwhile where they fit in beside.
void plan_readings(DivergenceJob& job, ScalarType dtype) {
  const int64_t waiting = 2 * (dtype == ScalarType::Double ? 8 : 4), logits = job.a.itemsize() + job.b.itemsize();
  job.wait = isa() != Isa::avx512 || job.a.cols() * (waiting + logits) <= second_cache_bytes();
  job.ahead = job.a.cols() * ((job.wait ? waiting : 0) + 2 * logits) <= second_cache_bytes();
}

DivergenceJob make_job(
    const Tensor& input, const Tensor& target, const Weight& weight, int64_t reduction, bool detach, int64_t kind,
    double beta, double temperature) {
  STD_TORCH_CHECK(kind >= 0 && kind <= int64_t(kLastKind), "divergence: unknown kind ", kind);
  DivergenceJob job{
      Rows(input), Rows(target), data_or_null(weight), nullptr, false, 1.0, detach,
      Kind(kind), beta, 1 / temperature, greatest(Kind(kind), beta), true, false};
  STD_TORCH_CHECK(
      job.a.rows() == job.b.rows() && job.a.cols() == job.b.cols(), "divergence: input and target differ in shape");
  STD_TORCH_CHECK(
      !weight || (weight->numel() == job.a.rows() && weight->is_contiguous() &&
                  weight->scalar_type() == compute_dtype(input)),
      "divergence: weight must be contiguous, one per row, in the dtype of the arithmetic");
  job.scale = normaliser(input, weight, job.a.rows(), reduction);
  plan_readings(job, compute_dtype(input));
  return job;
}

void run(DivergenceJob job) {
  if (std::isinf(job.scale)) job.scale = 0;  // a mean in which no row counts: NaN, but nothing is asked of the rows
  const int64_t rows = job.a.rows(), grain = std::max<int64_t>(1, kGrain / job.a.cols());
  const auto kernel = SK_DISPATCH(divergence_rows);
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
Tensor run_with_loss(DivergenceJob& job, const Tensor& input, const Weight& weight, int64_t reduction) {
  const ScalarType dtype = compute_dtype(input);
  const int64_t rows = job.a.rows();
  alignas(double) char few[kFewRows * sizeof(double)];  // no allocation where a batch is small
  const bool keep = reduction == kNone || rows > kFewRows;
  const int64_t count[] = {rows};
  std::optional<Tensor> losses;
  if (keep)
    losses = reduction == kNone ? empty_cpu(input.sizes().data(), input.dim() - 1, dtype) : empty_cpu(count, 1, dtype);
  job.losses = losses ? losses->mutable_data_ptr() : few;
  run(job);
  // A row of weight 0 has loss 0, so that no product of 0 and what it holds can spoil the sum.
  if (reduction == kNone) {
    if (job.weight) (dtype == ScalarType::Double ? scale_by<double> : scale_by<float>)(job.losses, job.weight, rows);
    return *losses;
  }
  const double sum = sum_of(dtype, job.losses, job.weight, rows) * job.scale;
  Tensor loss = empty_cpu({}, dtype);
  if (dtype == ScalarType::Double) *static_cast<double*>(loss.mutable_data_ptr()) = sum;
  else *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(sum);
  return loss;
}

Tensor forward(
    Tensor input, Tensor target, Weight weight, int64_t reduction, bool detach, int64_t kind, double beta,
    double temperature) {
  DivergenceJob job = make_job(input, target, weight, reduction, detach, kind, beta, temperature);
  return run_with_loss(job, input, weight, reduction);
}

// Allocates the gradients that are wanted
std::tuple<Tensor, Tensor> make_grads(DivergenceJob& job, const Tensor& input, const Tensor& target, bool input_grad, bool target_grad) {
  Tensor grad_a = input_grad ? empty_cpu_like(input) : empty_cpu({0}, input.scalar_type());
  Tensor grad_b = target_grad ? empty_cpu_like(target) : empty_cpu({0}, target.scalar_type());
  if (input_grad) job.grad_a = grad_a.mutable_data_ptr();
  if (target_grad) job.grad_b = grad_b.mutable_data_ptr();
  return {grad_a, grad_b};
}

std::tuple<Tensor, Tensor> backward(
    std::optional<Tensor> grad_output, Tensor input, Tensor target, Weight weight, int64_t reduction, bool detach,
    bool input_grad, bool target_grad, int64_t kind, double beta, double temperature) {
  DivergenceJob job = make_job(input, target, weight, reduction, detach, kind, beta, temperature);
  Tensor upstream;
  if (grad_output) {
    upstream = torch::stable::contiguous(*grad_output);
    job.upstream_rows = reduction == kNone;
    STD_TORCH_CHECK(
        upstream.scalar_type() == compute_dtype(input) && upstream.numel() == (job.upstream_rows ? job.a.rows() : 1),
        "divergence_backward: grad_output must have the shape and dtype of the loss");
    job.upstream = upstream.const_data_ptr();
  }
  auto grads = make_grads(job, input, target, input_grad, target_grad);
  run(job);
  return grads;
}

Tensor grad(
    Tensor input, Tensor target, Weight weight, int64_t reduction, bool detach, int64_t kind, double beta,
    double temperature) {
  return std::get<0>(
      backward(std::nullopt, input, target, weight, reduction, detach, true, false, kind, beta, temperature));
}

std::tuple<Tensor, Tensor, Tensor> forward_backward(
    Tensor input, Tensor target, Weight weight, int64_t reduction, bool detach, bool input_grad, bool target_grad,
    int64_t kind, double beta, double temperature) {
  DivergenceJob job = make_job(input, target, weight, reduction, detach, kind, beta, temperature);
  auto [grad_a, grad_b] = make_grads(job, input, target, input_grad, target_grad);
  return {run_with_loss(job, input, weight, reduction), grad_a, grad_b};
}

// See reference.py: b, and a or a - b, give way to their gradients; a third part takes the sum of both.
Tensor in_place(
    Tensor rows, Weight weight, Weight scale, bool difference, bool gradients, bool detach, int64_t kind, double beta,
    double temperature) {
  STD_TORCH_CHECK(kind >= 0 && kind <= int64_t(kLastKind), "divergence_rows_: unknown kind ", kind);
  STD_TORCH_CHECK(
      rows.dim() == 3 && rows.is_contiguous() && (rows.size(0) == 2 || (rows.size(0) == 3 && difference && !detach)) &&
          (rows.scalar_type() == ScalarType::Float || rows.scalar_type() == ScalarType::Double),
      "divergence_rows_: rows must be (2 or 3, N, C), contiguous, in the dtype of the arithmetic");
  const ScalarType dtype = rows.scalar_type();
  const int64_t count = rows.size(1), cols = rows.size(2), itemsize = rows.element_size();
  for (const auto& [factor, least] : {std::pair(&weight, count), std::pair(&scale, int64_t(1))})
    STD_TORCH_CHECK(
        !*factor || ((*factor)->is_contiguous() && (*factor)->scalar_type() == dtype &&
                     ((*factor)->numel() == count || (*factor)->numel() == least)),
        "divergence_rows_: weight and scale must be contiguous, one per row, in the dtype of the rows");
  char* const b = static_cast<char*>(rows.mutable_data_ptr());
  char* const a = b + count * cols * itemsize;
  DivergenceJob job{
      Rows(a, dtype, itemsize, count, cols), Rows(b, dtype, itemsize, count, cols), data_or_null(weight),
      data_or_null(scale), scale && scale->numel() == count, 1.0, detach, Kind(kind), beta, 1 / temperature,
      greatest(Kind(kind), beta), true, false};
  plan_readings(job, dtype);
  job.difference = difference;
  job.in_place = true;
  if (gradients) {
    job.grad_a = a;
    job.grad_b = b;
    if (rows.size(0) == 3) job.grad_both = a + count * cols * itemsize;
  }
  Tensor losses = empty_cpu({count}, dtype);
  job.losses = losses.mutable_data_ptr();
  if (count) run(job);
  if (weight) (dtype == ScalarType::Double ? scale_by<double> : scale_by<float>)(job.losses, weight->const_data_ptr(), count);
  return losses;
}

}  // namespace
}  // namespace smart_kernels

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CPU, m) {
  m.impl("divergence", TORCH_BOX(&smart_kernels::forward));
  m.impl("divergence_backward", TORCH_BOX(&smart_kernels::backward));
  m.impl("divergence_grad", TORCH_BOX(&smart_kernels::grad));
  m.impl("divergence_forward_backward", TORCH_BOX(&smart_kernels::forward_backward));
  m.impl("divergence_rows_", TORCH_BOX(&smart_kernels::in_place));
}
