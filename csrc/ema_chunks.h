// The table of chunks that ops/_chunks.py makes, one column a chunk: what the kernels of both devices walk through.
#pragma once

#include <cstdint>

namespace smart_kernels {

struct EmaChunks {
  const int64_t *shadow, *parameter;                // addresses
  const int64_t *start, *count;                     // elements before the chunk, rounded up to groups, and in it
  const int64_t *dtypes;                            // of the shadow + 4 * of the parameter, numbered as below
  const int64_t *shadow_stride, *parameter_stride;  // in elements
};
constexpr int64_t kColumns = 7;

enum Dtype : int64_t { kFloat, kBfloat16, kFloat16, kDouble };

// Elements that share 16 counters of the random generator: their four words go to places 16 apart
constexpr int64_t kNoiseGroup = 64;

}  // namespace smart_kernels
