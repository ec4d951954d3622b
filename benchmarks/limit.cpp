// The loads and stores of a long row's divergence, with next to no arithmetic; see limit.py.
#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
  uint16_t bits;
};
inline float value(float x) { return x; }
inline float value(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = uint16_t((bits + 0x8000) >> 16);
}

// What waits is at the gradients' place where they are fp32, else in scratch.
template <typename T, bool wait>
void run(const T* __restrict a, const T* __restrict b, T* __restrict to_a, T* __restrict to_b, float* __restrict scratch,
         int64_t rows, int64_t cols) {
  constexpr bool in_place = sizeof(T) == sizeof(float);
  constexpr int64_t sums = 64, line = 64 / sizeof(T);
  for (int64_t i = 0; i < rows; ++i, a += cols, b += cols, to_a += cols, to_b += cols) {
    float *const wait_b = scratch + cols, sum_a[sums] = {}, sum_b[sums] = {};
    const auto park = [&](int64_t j, float x, float y) {
      if constexpr (wait && in_place) put(to_a + j, x), put(to_b + j, y);
      else if constexpr (wait) scratch[j] = x, wait_b[j] = y;
    };
    int64_t j = 0;
    for (; j + sums <= cols; j += sums)
      for (int64_t k = 0; k < sums; ++k) {
        const float x = value(a[j + k]), y = value(b[j + k]);
        sum_a[k] += x;
        sum_b[k] += y;
        park(j + k, x, y);
      }
    for (; j < cols; ++j) park(j, value(a[j]), value(b[j]));
    float p = 0, q = 0;
    for (int k = 0; k < sums; ++k) p += sum_a[k], q += sum_b[k];
    const T *const next_a = i + 1 < rows ? a + cols : a, *const next_b = i + 1 < rows ? b + cols : b;
    const auto finish = [&](int64_t k) {
      const float x = value(a[k]) + p, y = value(b[k]) + q;
      if constexpr (wait && in_place) put(to_a + k, x + value(to_a[k])), put(to_b + k, y + value(to_b[k]));
      else if constexpr (wait) put(to_a + k, x + scratch[k]), put(to_b + k, y + wait_b[k]);
      else put(to_a + k, x), put(to_b + k, y);
    };
    for (j = 0; j + line <= cols; j += line) {
      __builtin_prefetch(next_a + j, 0, 2);  // memory is never idle
      __builtin_prefetch(next_b + j, 0, 2);
      for (int64_t k = j; k < j + line; ++k) finish(k);
    }
    for (; j < cols; ++j) finish(j);
  }
}

}  // namespace

#define LOOP(name, T, wait)                                                                            \
  extern "C" void name(                                                                                \
      const void* a, const void* b, void* to_a, void* to_b, float* scratch, int64_t rows, int64_t cols) { \
    run<T, wait>(static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(to_a), static_cast<T*>(to_b), \
                 scratch, rows, cols);                                                                 \
  }
LOOP(float32_waiting, float, true)
LOOP(float32_anew, float, false)
LOOP(bfloat16_waiting, bf16, true)
LOOP(bfloat16_anew, bf16, false)
