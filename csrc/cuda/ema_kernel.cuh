// Exponential moving averages e <- e + (1 - decay)(p - e) of chunks of tensors, in place: a block a chunk. Needs no
// header of torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/philox.cuh"
#include "ema_chunks.h"

namespace smart_kernels {

#define SK_INLINE __device__ __forceinline__

SK_INLINE float multiply(float a, float b) { return __fmul_rn(a, b); }
SK_INLINE float add(float a, float b) { return __fadd_rn(a, b); }
SK_INLINE float subtract(float a, float b) { return __fsub_rn(a, b); }
SK_INLINE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SK_INLINE float magnitude(float a) { return fabsf(a); }
SK_INLINE double multiply(double a, double b) { return __dmul_rn(a, b); }
SK_INLINE double add(double a, double b) { return __dadd_rn(a, b); }
SK_INLINE double subtract(double a, double b) { return __dsub_rn(a, b); }
SK_INLINE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
SK_INLINE double magnitude(double a) { return fabs(a); }
template <typename V>
SK_INLINE bool all_less(V a, V b) {
  return a < b;
}
template <typename V>
SK_INLINE bool all_at_most(V a, V b) {
  return a <= b;
}
template <typename V>
SK_INLINE V select(bool mask, V a, V b) {
  return mask ? a : b;
}

#include "ema_formula.h"

using bf16 = __nv_bfloat16;
using fp16 = __half;

SK_INLINE float widen(float x) { return x; }
SK_INLINE double widen(double x) { return x; }
SK_INLINE float widen(bf16 x) { return __bfloat162float(x); }
SK_INLINE float widen(fp16 x) { return __half2float(x); }
SK_INLINE void narrow(float x, float& out) { out = x; }
SK_INLINE void narrow(double x, double& out) { out = x; }
SK_INLINE void narrow(float x, bf16& out) { out = __float2bfloat16_rn(x); }
SK_INLINE void narrow(float x, fp16& out) { out = __float2half_rn(x); }

template <typename E>
SK_INLINE void narrow_stochastically(float x, uint32_t random, E& out) {
  using Format = std::conditional_t<std::is_same_v<E, bf16>, Bfloat16, Float16>;
  narrow(x, out);
  const uint32_t bits = __float_as_uint(x), positive = bits & 0x7fffffff;
  if (__uint_as_float(positive) <= Format::largest)
    reinterpret_cast<uint16_t&>(out) =
        static_cast<uint16_t>(stochastic_magnitude<Format>(positive, random) | bits >> 31 << 15);
}

template <typename E>
using Arithmetic = std::conditional_t<std::is_same_v<E, double>, double, float>;

template <bool kStochastic, typename E, typename P>
SK_INLINE void update(E& e, P p, const Coefficients<Arithmetic<E>>& k, uint32_t random) {
  if constexpr (std::is_same_v<E, P>) {
    if (k.decay == 0) {  // to the bit, NaNs too
      e = p;
      return;
    }
  }
  const auto parameter = widen(p);
  const auto moved = k.decay == 0 ? parameter : move_towards<sizeof(E) == 2>(widen(e), parameter, k);
  if constexpr (kStochastic) narrow_stochastically(moved, random, e);
  else narrow(moved, e);
}

// N elements that a thread reads or writes with one instruction
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T lane[N];
};

constexpr int kThreads = 256;

template <bool kStochastic, typename E, typename P>
__device__ void update_chunk(const EmaChunks& chunks, double decay, uint64_t seed) {
  Coefficients<Arithmetic<E>> k;
  if constexpr (std::is_same_v<E, double>) k = double_coefficients(decay);
  else k = float_coefficients(decay);
  const int64_t chunk = blockIdx.x;
  E* e = reinterpret_cast<E*>(chunks.shadow[chunk]);
  const P* p = reinterpret_cast<const P*>(chunks.parameter[chunk]);
  __builtin_assume(__isGlobal(e));
  __builtin_assume(__isGlobal(p));
  const int64_t e_stride = chunks.shadow_stride[chunk], p_stride = chunks.parameter_stride[chunk];
  const int count = static_cast<int>(chunks.count[chunk]), thread = static_cast<int>(threadIdx.x);
  const uint64_t first_counter = chunks.start[chunk] / kNoiseGroup * 16;

  const auto update_one = [&](int i) {
    uint32_t random = 0;
    if constexpr (kStochastic) {
      uint32_t words[4];
      philox(seed, first_counter + i / kNoiseGroup * 16 + i % 16, words);
      const int word = i % kNoiseGroup / 16;
      random = word == 0 ? words[0] : word == 1 ? words[1] : word == 2 ? words[2] : words[3];
    }
    update<kStochastic>(e[i * e_stride], p[i * p_stride], k, random);
  };

  constexpr int N = 16 / (sizeof(E) > sizeof(P) ? sizeof(E) : sizeof(P));
  using PackE = Pack<E, N>;
  using PackP = Pack<P, N>;
  // Up to `head` elements come before both are aligned, if they are at the same time
  const int head = min(static_cast<int>(-(chunks.shadow[chunk] / sizeof(E)) % N), count);
  const bool alike = (chunks.parameter[chunk] / sizeof(P) + head) % N == 0 && e_stride == 1 && p_stride == 1;
  if (!alike || (kStochastic && head != 0)) {
    for (int i = thread; i < count; i += kThreads) update_one(i);
    return;
  }
  if (thread < head) update_one(thread);

  // A thread's packs under way at once lie kThreads packs apart, two in 64 registers, so that four blocks share a
  // multiprocessor. With random numbers they are four and lie 16 elements apart: the thread uses all words of its N
  // counters.
  constexpr int kUnrolled = kStochastic ? 4 : 2, kStep = kStochastic ? 16 : kThreads * N;
  constexpr int kPerGroup = 16 / N;  // threads that share a group of 64 elements
  const int first = kStochastic ? thread / kPerGroup * kNoiseGroup + thread % kPerGroup * N : thread * N;
  for (int base = head + first; base < count; base += kThreads * N * kUnrolled) {
    PackE old[kUnrolled] = {};
    PackP parameter[kUnrolled] = {};
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      const int i = base + u * kStep;
      if (i + N > count) continue;
      old[u] = *reinterpret_cast<const PackE*>(e + i);
      parameter[u] = *reinterpret_cast<const PackP*>(p + i);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      uint32_t random[4] = {};
      if constexpr (kStochastic) philox(seed, first_counter + base / kNoiseGroup * 16 + base % 16 + j, random);
#pragma unroll
      for (int u = 0; u < kUnrolled; ++u) update<kStochastic>(old[u].lane[j], parameter[u].lane[j], k, random[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      const int i = base + u * kStep;
      if (i + N <= count) *reinterpret_cast<PackE*>(e + i) = old[u];
    }
  }
  if (const int i = head + (count - head) / N * N + thread; i < count) update_one(i);
}

template <bool kStochastic, typename E>
__device__ void update_from(int64_t parameter_dtype, const EmaChunks& chunks, double decay, uint64_t seed) {
  switch (parameter_dtype) {
    case kFloat: return update_chunk<kStochastic, E, float>(chunks, decay, seed);
    case kBfloat16: return update_chunk<kStochastic, E, bf16>(chunks, decay, seed);
    case kFloat16: return update_chunk<kStochastic, E, fp16>(chunks, decay, seed);
  }
}

// The decay and the seed may lie on the device, so that a schedule waits for nothing and a graph can be replayed
template <bool kStochastic>
__global__ void __launch_bounds__(kThreads) ema_update_kernel(
    EmaChunks chunks, double decay, const void* decay_tensor, bool decay_is_double, const uint64_t* seed) {
  if (decay_tensor)
    decay = decay_is_double ? *static_cast<const double*>(decay_tensor) : *static_cast<const float*>(decay_tensor);
  if (decay == 1) return;  // e stays, whatever p holds
  const uint64_t key = kStochastic ? *seed : 0;
  const int64_t dtypes = chunks.dtypes[blockIdx.x];
  switch (dtypes % 4) {
    case kFloat: return update_from<false, float>(dtypes / 4, chunks, decay, key);
    case kBfloat16: return update_from<kStochastic, bf16>(dtypes / 4, chunks, decay, key);
    case kFloat16: return update_from<kStochastic, fp16>(dtypes / 4, chunks, decay, key);
    case kDouble: return update_chunk<false, double, double>(chunks, decay, key);
  }
}

}  // namespace smart_kernels
