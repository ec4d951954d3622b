// The loads and stores of a long row's divergence, with next to no arithmetic, or with the least; see limit.py.
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

// Good to some units in the last place, for |x| < 80 alone.
inline float exponential(float x) {
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const float shifted = x * 1.44269504f + round;
  const float r = x - (shifted - round) * 0.693147181f;
  float y = ((((8.333333e-3f * r + 4.1666667e-2f) * r + 1.6666667e-1f) * r + 0.5f) * r + 1) * r + 1;
  uint32_t power, bits;
  std::memcpy(&power, &shifted, 4);
  std::memcpy(&bits, &y, 4);
  bits += power << 23;
  std::memcpy(&y, &bits, 4);
  return y;
}

// The symmetric KL's gradients, for the sum over rows, by the least arithmetic: no maximum is subtracted, no digit saved.
template <typename T>
void careless(const T* __restrict a, const T* __restrict b, T* __restrict to_a, T* __restrict to_b,
              float* __restrict scratch, int64_t rows, int64_t cols) {
  constexpr bool in_place = sizeof(T) == sizeof(float);
  constexpr int64_t sums = 64, line = 64 / sizeof(T);
  for (int64_t i = 0; i < rows; ++i, a += cols, b += cols, to_a += cols, to_b += cols) {
    float *const wait_b = scratch + cols, sum_a[sums] = {}, sum_b[sums] = {}, far_a[sums] = {}, far_b[sums] = {};
    const auto add = [&](int64_t j, int64_t k) {
      const float x = value(a[j]), y = value(b[j]), e = exponential(x), f = exponential(y);
      sum_a[k] += e, far_a[k] += e * (x - y);
      sum_b[k] += f, far_b[k] += f * (x - y);
      if constexpr (in_place) put(to_a + j, e), put(to_b + j, f);
      else scratch[j] = e, wait_b[j] = f;
    };
    int64_t j = 0;
    for (; j + sums <= cols; j += sums)
      for (int64_t k = 0; k < sums; ++k) add(j + k, k);
    for (; j < cols; ++j) add(j, 0);
    float p = 0, q = 0, mean_p = 0, mean_q = 0;
    for (int k = 0; k < sums; ++k) p += sum_a[k], q += sum_b[k], mean_p += far_a[k], mean_q += far_b[k];
    p = 1 / p, q = 1 / q, mean_p *= p, mean_q *= q;
    const T *const next_a = i + 1 < rows ? a + cols : a, *const next_b = i + 1 < rows ? b + cols : b;
    const auto finish = [&](int64_t k) {
      const float x = value(a[k]), y = value(b[k]);
      const float e = p * (in_place ? value(to_a[k]) : scratch[k]), f = q * (in_place ? value(to_b[k]) : wait_b[k]);
      put(to_a + k, e * (x - y - mean_p) + (e - f));
      put(to_b + k, f * (mean_q - (x - y)) - (e - f));
    };
    for (j = 0; j + line <= cols; j += line) {
      __builtin_prefetch(next_a + j, 0, 2);
      __builtin_prefetch(next_b + j, 0, 2);
      for (int64_t k = j; k < j + line; ++k) finish(k);
    }
    for (; j < cols; ++j) finish(j);
  }
}

}  // namespace

#define LOOP(name, T, function)                                                                        \
  extern "C" void name(                                                                                \
      const void* a, const void* b, void* to_a, void* to_b, float* scratch, int64_t rows, int64_t cols) { \
    function(static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(to_a), static_cast<T*>(to_b), \
             scratch, rows, cols);                                                                     \
  }
LOOP(float32_waiting, float, (run<float, true>))
LOOP(float32_anew, float, (run<float, false>))
LOOP(float32_careless, float, careless<float>)
LOOP(bfloat16_waiting, bf16, (run<bf16, true>))
LOOP(bfloat16_anew, bf16, (run<bf16, false>))
LOOP(bfloat16_careless, bf16, careless<bf16>)
