// What a CPU thread needs to know to update a range of chunks.
#pragma once

#include "ema_chunks.h"

namespace smart_kernels {

struct EmaJob {
  EmaChunks chunks;
  double decay;
  bool stochastic;
  uint64_t seed;
};

}  // namespace smart_kernels
