// What a CPU thread needs to know to do a range of rows of a divergence.
#pragma once

#include "cpu/kinds.h"
#include "cpu/rows.h"

namespace smart_kernels {

struct DivergenceJob {
  Rows a, b;
  const void* weight;    // a factor per row in the arithmetic's type, or null
  const void* upstream;  // the loss's gradient, one for all rows or one per row, or null for 1
  bool upstream_rows;
  double scale;          // a further factor on the losses' sum and all gradients
  bool detach_targets;   // of the symmetric KL
  Kind kind;
  double beta;
  double inverse;        // 1 / temperature
  double greatest;       // which the divergence cannot exceed
  bool wait;             // the exponentials of a row may wait for its second reading
  bool ahead;            // the next row may be asked for meanwhile
  void *losses = nullptr, *grad_a = nullptr, *grad_b = nullptr;  // each contiguous, or null: not wanted
  bool difference = false;    // what stands for a is a - b
  bool in_place = false;      // the gradients take the logits' place
  void* grad_both = nullptr;  // the sum of both, with a difference alone
};

// The rows [begin, end), in divergence_kernel.h, compiled for each instruction set in a file of its own
namespace avx512 {
void divergence_rows(const DivergenceJob& job, int64_t begin, int64_t end);
}
namespace avx2 {
void divergence_rows(const DivergenceJob& job, int64_t begin, int64_t end);
}
namespace baseline {
void divergence_rows(const DivergenceJob& job, int64_t begin, int64_t end);
}

}  // namespace smart_kernels
