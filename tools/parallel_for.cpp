// torch's parallel_for on threads that the thread sanitizer sees: those of OpenMP's runtime, which is not instrumented,
// would look as if they never waited for each other. Preloaded, it stands in for torch's own.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

constexpr int64_t kThreads = 4;

extern "C" {

int32_t torch_get_num_threads(uint32_t* count) {
  *count = kThreads;
  return 0;
}

int32_t torch_parallel_for(
    int64_t begin, int64_t end, int64_t grain, void (*function)(int64_t, int64_t, void*), void* context) {
  if (begin >= end) return 0;
  const int64_t threads = std::clamp<int64_t>((end - begin) / std::max<int64_t>(grain, 1), 1, kThreads);
  const int64_t size = (end - begin + threads - 1) / threads;
  std::vector<std::thread> others;
  for (int64_t first = begin + size; first < end; first += size)
    others.emplace_back(function, first, std::min(first + size, end), context);
  function(begin, std::min(begin + size, end), context);
  for (std::thread& thread : others) thread.join();
  return 0;
}

}  // extern "C"
