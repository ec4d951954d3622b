// What a CPU thread needs to know to do a range of rows of a symmetric KL.
#pragma once

#include "cpu/rows.h"

namespace smart_kernels {

struct SymmetricKLJob {
  Rows a, b;
  const void* weight;    // a factor per row in the arithmetic's type, or null
  const void* upstream;  // the loss's gradient, one for all rows or one per row, or null for 1
  bool upstream_rows;
  double scale;          // a further factor on all gradients
  bool detach_targets;
  bool wait;             // the exponentials of a row may wait for its second reading
  bool ahead;            // the next row may be asked for meanwhile
  void *losses, *grad_a, *grad_b;  // each contiguous, or null: not wanted
};

}  // namespace smart_kernels
