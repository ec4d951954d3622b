// What a CPU thread needs to know to move a part of a perturbation, or to start one.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "cpu/rows.h"

namespace smart_kernels {

// The positions that count: a number per row of any real dtype, 0 where it does not; without a mask, all do.
class RowMask {
 public:
  explicit RowMask(const std::optional<Tensor>& mask) {
    if (!mask) return;
    data_ = mask->const_data_ptr();
    itemsize_ = mask->element_size();
    const ScalarType dtype = mask->scalar_type();
    // -0 is 0 as well
    sign_bits_ = dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float ||
                 dtype == ScalarType::Double;
  }
  bool operator()(int64_t row) const {
    if (!data_) return true;
    switch (itemsize_) {
      case 1: return nonzero<uint8_t>(row);
      case 2: return nonzero<uint16_t>(row);
      case 4: return nonzero<uint32_t>(row);
      default: return nonzero<uint64_t>(row);
    }
  }

 private:
  template <typename Bits>
  bool nonzero(int64_t row) const {
    return Bits(static_cast<const Bits*>(data_)[row] << sign_bits_) != 0;
  }
  const void* data_ = nullptr;
  int64_t itemsize_ = 0;
  int sign_bits_ = 0;
};

enum Norm : int64_t { kLinf, kL2 };  // as numbered in reference.py
enum Scope : int64_t { kSample, kToken };
enum Ascent : int64_t { kNormalized, kSign, kRaw };

// A norm is taken over a unit: the rows of a sample, or one row. Columns are contiguous in all three tensors.
struct StepJob {
  Rows delta, grad, out;
  RowMask mask;
  int64_t unit_rows;
  double step_size, epsilon;
  Norm norm;
  Ascent ascent;
  bool streamed;  // out is new memory, and too large to stay in cache

  int64_t unit_size() const { return unit_rows * delta.cols(); }
};

// What a part of a unit tells of the gradient's direction d (g, or its signs) and of delta. The sums over d are of
// d * scale, a power of two by which no square over- or underflows.
struct Partial {
  double largest;  // |g|; not finite where one is not
  double scale;
  double dd, d_delta, delta_delta;  // sums of products
};

// The power of two that takes x to 1 .. 2; near the ends of T's range, as near to it as T holds
template <typename T>
double scale_of(double x) {
  constexpr int limit = std::numeric_limits<T>::max_exponent - 2;
  return x > 0 && std::isfinite(x) ? std::ldexp(1.0, std::clamp(-std::ilogb(x), -limit, limit)) : 1;
}

// What becomes of a unit: delta * keep + (d * scale) * step, then clamped to +-bound
struct Move {
  bool moves, skipped;
  double keep, scale, step, bound;
};

struct InitJob {
  void* out;
  ScalarType dtype;
  int64_t numel, cols;
  RowMask mask;
  uint64_t seed;
  double std;
};

constexpr int64_t kNoiseGroup = 64;  // elements made together, from 16 counters

}  // namespace smart_kernels
