// The perturbation on the CPU: its start, and its step. Whatever the number of threads, sums run over the same parts
// in the same order, so the bits are the same.
#include "cpu/perturbation.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <optional>
#include <vector>

#include "cpu/tensors.h"

#define SK_KERNEL "cpu/perturbation_kernel.h"
#include "cpu/foreach_isa.h"

namespace smart_kernels {
namespace {

constexpr int64_t kPart = 4096;          // elements that are summed in one go: a second reading is from the first cache
constexpr int64_t kGrain = 16384;        // elements that are worth a thread of their own
constexpr int64_t kStreamed = 8 << 20;  // bytes of an output that goes past the caches

// Adds up a unit's parts and finds the step, which ends on or within the ball.
template <typename T>
Move plan(const StepJob& job, const Partial* parts, int64_t count) {
  Partial unit{0, 1, 0, 0, 0};
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    finite &= std::isfinite(parts[i].largest);
    unit.largest = std::max(unit.largest, parts[i].largest);
  }
  const bool moves = finite && unit.largest > 0;
  if (moves && job.ascent != kSign) unit.scale = scale_of<T>(unit.largest);
  for (int64_t i = 0; i < count; ++i) {
    const Partial& part = parts[i];
    unit.delta_delta += part.delta_delta;
    if (!moves || part.largest == 0) continue;
    const double ratio = unit.scale / part.scale;
    unit.dd += part.dd * ratio * ratio;
    unit.d_delta += part.d_delta * ratio;
  }

  double length = 0;  // of the step, by d * scale
  if (moves) {
    length = job.step_size;
    if (job.ascent == kNormalized) length /= job.norm == kL2 ? std::sqrt(unit.dd) : unit.largest * unit.scale;
    if (job.ascent == kRaw) length /= unit.scale;
    length = std::min(length, 1e28);  // so long a step hides delta, and is still finite
  }
  if (job.norm == kLinf) {
    T bound = T(job.epsilon);  // rounded down, so that it holds in double as well
    if (bound > job.epsilon) bound = std::nextafter(bound, T(0));
    return {moves, !finite, 1, unit.scale, length, bound};
  }
  // The norm of delta + step, in double, and an upper bound of it with the rounding of the sums and of the result.
  // Without a step, a delta within the ball stays as it is.
  constexpr double kRounding = 2 * std::numeric_limits<T>::epsilon(), kSummation = 1e-12;
  const double total = std::sqrt(unit.delta_delta) + length * std::sqrt(unit.dd);
  const double square = unit.delta_delta + length * (2 * unit.d_delta + length * unit.dd);
  double size = std::sqrt(unit.delta_delta);
  if (moves) size = std::sqrt(std::max(0.0, square) + kSummation * total * total) + kRounding * total;
  double keep = 1;
  if (!(size <= job.epsilon)) keep = job.epsilon / (moves ? size : size * (1 + kRounding + kSummation));
  return {moves, !finite, keep, unit.scale, length * keep, std::numeric_limits<T>::infinity()};
}

// Makes stores past the caches visible to the threads that wait for this one
void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// One unit after another for each thread, so that its second reading is from cache; or all units' parts at once,
// where there are too few units to keep the threads busy. Returns the number of units that were skipped.
template <typename T>
int64_t run(const StepJob& job) {
  const int64_t size = job.unit_size(), units = job.delta.rows() / job.unit_rows;
  const int64_t parts = (size + kPart - 1) / kPart;
  const auto gather = SK_DISPATCH(gather_part);
  const auto apply = SK_DISPATCH(apply_part);
  const auto at = [&](int64_t part) { return std::min(part * kPart, size); };
  std::atomic<int64_t> skipped = 0;

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t rounds = (units + threads - 1) / threads;
  if (parts == 1 || units * 5 >= rounds * threads * 4) {  // at most a fifth of the threads' time is idle
    torch::stable::parallel_for(0, units, std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
      std::vector<Partial> partials(parts);
      for (int64_t unit = begin; unit < end; ++unit) {
        for (int64_t i = 0; i < parts; ++i) partials[i] = gather(job, unit, at(i), at(i + 1));
        const Move move = plan<T>(job, partials.data(), parts);
        skipped += move.skipped;
        apply(job, unit, 0, size, move);
      }
      fence();
    });
  } else {
    std::vector<Partial> partials(units * parts);
    torch::stable::parallel_for(0, units * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) partials[i] = gather(job, i / parts, at(i % parts), at(i % parts + 1));
    });
    std::vector<Move> moves;
    for (int64_t unit = 0; unit < units; ++unit) {
      moves.push_back(plan<T>(job, &partials[unit * parts], parts));
      skipped += moves.back().skipped;
    }
    torch::stable::parallel_for(0, units * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) apply(job, i / parts, at(i % parts), at(i % parts + 1), moves[i / parts]);
      fence();
    });
  }
  return skipped;
}

bool columns_contiguous(const Tensor& x) { return x.size(-1) <= 1 || x.stride(-1) == 1; }

using Option = std::optional<Tensor>;

void step(
    const Tensor& delta, Tensor grad, const Option& mask, const Option& skipped, double step_size, double epsilon,
    int64_t norm, int64_t scope, int64_t ascent, Tensor& out) {
  if (delta.numel() == 0) return;
  if (!columns_contiguous(grad)) grad = torch::stable::contiguous(grad);
  const int64_t rows = delta.numel() / delta.size(-1), bytes = out.numel() * out.element_size();
  const StepJob job{
      Rows(delta), Rows(grad), Rows(out), RowMask(mask), scope == kToken ? 1 : rows / delta.size(0),
      step_size, epsilon, Norm(norm), Ascent(ascent), out.get() != delta.get() && bytes >= kStreamed};
  STD_TORCH_CHECK(!mask || (mask->is_contiguous() && mask->numel() == rows),
                  "perturbation_step: mask must be contiguous, one per row");
  const int64_t count = delta.scalar_type() == ScalarType::Double ? run<double>(job) : run<float>(job);
  if (skipped) *static_cast<int64_t*>(skipped->mutable_data_ptr()) += count;
}

Tensor perturbation_step(
    Tensor delta, Tensor grad, Option mask, Option skipped, double step_size, double epsilon, int64_t norm,
    int64_t scope, int64_t ascent) {
  if (!columns_contiguous(delta)) delta = torch::stable::contiguous(delta);
  Tensor out = empty_cpu_like(delta);
  step(delta, grad, mask, skipped, step_size, epsilon, norm, scope, ascent, out);
  return out;
}

void perturbation_step_(
    Tensor delta, Tensor grad, Option mask, Option skipped, double step_size, double epsilon, int64_t norm,
    int64_t scope, int64_t ascent) {
  if (columns_contiguous(delta)) {
    step(delta, grad, mask, skipped, step_size, epsilon, norm, scope, ascent, delta);
  } else {
    torch::stable::copy_(
        delta, perturbation_step(delta, grad, mask, skipped, step_size, epsilon, norm, scope, ascent));
  }
}

Tensor init_perturbation(Tensor embeds, Tensor seed, Option mask, double std) {
  const bool wide = embeds.scalar_type() == ScalarType::Double;
  Tensor out = empty_cpu(embeds.sizes().data(), embeds.dim(), wide ? ScalarType::Double : ScalarType::Float);
  if (out.numel() == 0) return out;
  const InitJob job{out.mutable_data_ptr(), out.scalar_type(), out.numel(), out.size(-1), RowMask(mask),
                    *static_cast<const uint64_t*>(seed.const_data_ptr()), std};
  const auto groups = SK_DISPATCH(noise_groups);
  torch::stable::parallel_for(0, (job.numel + kNoiseGroup - 1) / kNoiseGroup, 64, [&](int64_t begin, int64_t end) {
    groups(job, begin, end);
  });
  return out;
}

}  // namespace
}  // namespace smart_kernels

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CPU, m) {
  m.impl("init_perturbation", TORCH_BOX(&smart_kernels::init_perturbation));
  m.impl("perturbation_step", TORCH_BOX(&smart_kernels::perturbation_step));
  m.impl("perturbation_step_", TORCH_BOX(&smart_kernels::perturbation_step_));
}
