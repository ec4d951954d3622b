// Exponential moving averages e <- e + (1 - decay)(p - e) of chunks of tensors, in place.
//
// Elements that do not lie dense in memory, and of stochastically rounded ones the last few, are updated in a copy on
// the stack, 64 at a time: a group that shares 16 counters of the random generator.

#include "cpu/philox.h"

namespace smart_kernels::SK_ISA {

SK_INLINE Vec<float> fused(Vec<float> a, float b, Vec<float> c) {
#if SK_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(b), (__m512)c);
#elif SK_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(b), (__m256)c);
#elif defined(__x86_64__)
  for (int i = 0; i < kLanes<float>; ++i) c[i] = static_cast<float>(static_cast<double>(a[i]) * b + c[i]);
  return c;
#else
  for (int i = 0; i < kLanes<float>; ++i) c[i] = std::fma(a[i], b, c[i]);
  return c;
#endif
}
SK_INLINE Vec<double> fused(Vec<double> a, double b, Vec<double> c) {
#if SK_VECTOR_BYTES == 64
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, _mm512_set1_pd(b), (__m512d)c);
#elif SK_VECTOR_BYTES == 32
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, _mm256_set1_pd(b), (__m256d)c);
#else
  for (int i = 0; i < kLanes<double>; ++i) c[i] = std::fma(a[i], b, c[i]);
  return c;
#endif
}
// A product is contracted into a sum only where it has no other use; in the formula each has.
template <typename V, typename S>
SK_INLINE V multiply(V a, S b) {
  return a * b;
}
template <typename V>
SK_INLINE V add(V a, V b) {
  return a + b;
}
template <typename V>
SK_INLINE V subtract(V a, V b) {
  return a - b;
}
template <typename M, typename V>
SK_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}

template <typename V>
SK_INLINE V magnitude(V a) {
  return vabs<std::remove_reference_t<decltype(a[0])>>(a);
}
SK_INLINE bool all(Mask<float> m) { return !any<float>(~m); }
SK_INLINE bool all(Mask<double> m) { return !any<double>(~m); }

#include "ema_formula.h"

template <typename E>
using Arithmetic = std::conditional_t<std::is_same_v<E, double>, double, float>;

// The 32 random bits of each element of a group: of 64 elements, the four words of a counter go to places 16 apart
SK_INLINE void random_words(uint64_t seed, uint64_t group, uint32_t* out) {
  constexpr int half = SK_VECTOR_BYTES / 8;
  typedef uint32_t Half __attribute__((vector_size(SK_VECTOR_BYTES / 2)));
  Words lane;
  for (int i = 0; i < half; ++i) lane[i] = i;
  for (int first = 0; first < 16; first += half) {
    const Random random = philox(seed, lane + (group * 16 + first));
    for (int i = 0; i < 4; ++i) {
      const Half word = __builtin_convertvector(random.words[i], Half);
      __builtin_memcpy(out + 16 * i + first, &word, sizeof word);
    }
  }
}

template <typename E>
SK_INLINE void store_stochastically(E* e, Vec<float> x, const uint32_t* random) {
  using Format = std::conditional_t<std::is_same_v<E, bf16>, Bfloat16, Float16>;
  typedef uint32_t Bits __attribute__((vector_size(SK_VECTOR_BYTES)));
  typedef int16_t Mask16 __attribute__((vector_size(SK_VECTOR_BYTES / 2)));
  Bits words;
  __builtin_memcpy(&words, random, sizeof words);
  const Bits bits = (Bits)x, magnitude = bits & 0x7fffffff;
  const Bits16 stochastic =
      __builtin_convertvector(stochastic_magnitude<Format>(magnitude, words) | (bits >> 31 << 15), Bits16);
  Bits16 nearest;
  store(reinterpret_cast<E*>(&nearest), x);
  const Mask16 within = __builtin_convertvector((Vec<float>)magnitude <= Format::largest, Mask16);
  const Bits16 rounded = within ? stochastic : nearest;
  __builtin_memcpy(e, &rounded, sizeof rounded);
}

template <typename E, typename P>
SK_INLINE auto moved(const E* e, const P* p, const Coefficients<Arithmetic<E>>& k) {
  const Vec<Arithmetic<E>> parameter = load(p);
  return k.decay == 0 ? parameter : move_towards<sizeof(E) == 2>(load(e), parameter, k);
}

// Of elements that lie dense. The last vector overlaps the one before it: it is taken before that is stored. Meanwhile
// memory that comes later is asked for, into L2: the hardware does not look beyond a page, and many a tensor is as small.
template <typename E, typename P>
SK_INLINE void update_nearest(
    E* e, const P* p, int64_t count, const Coefficients<Arithmetic<E>>& k, const E* later_e, const P* later_p) {
  constexpr int N = kLanes<Arithmetic<E>>;
  const int64_t tail = count - N;
  const auto last = moved(static_cast<const E*>(e + tail), p + tail, k);
  for (int64_t i = 0; i < tail; i += N) {
    __builtin_prefetch(later_e + i, 0, 2);
    __builtin_prefetch(later_p + i, 0, 2);
    store(e + i, moved(static_cast<const E*>(e + i), p + i, k));
  }
  store(e + tail, last);
}

// Of a whole group
template <typename E, typename P>
SK_INLINE void update_stochastically(
    E* e, const P* p, const Coefficients<float>& k, uint64_t seed, uint64_t group) {
  uint32_t random[kNoiseGroup];
  random_words(seed, group, random);
  for (int i = 0; i < kNoiseGroup; i += kLanes<float>)
    store_stochastically(e + i, moved(static_cast<const E*>(e + i), p + i, k), random + i);
}

template <typename E, typename P, bool kStochastic>
void update_chunk(const EmaJob& job, int64_t chunk, int64_t later, const Coefficients<Arithmetic<E>>& k) {
  E* e = reinterpret_cast<E*>(job.chunks.shadow[chunk]);
  const P* p = reinterpret_cast<const P*>(job.chunks.parameter[chunk]);
  const int64_t count = job.chunks.count[chunk];
  const int64_t e_stride = job.chunks.shadow_stride[chunk], p_stride = job.chunks.parameter_stride[chunk];
  if constexpr (std::is_same_v<E, P>) {
    if (job.decay == 0) {  // to the bit, NaNs too
      for (int64_t i = 0; i < count; ++i) e[i * e_stride] = p[i * p_stride];
      return;
    }
  }
  const bool dense = e_stride == 1 && p_stride == 1;
  const uint64_t first_group = job.chunks.start[chunk] / kNoiseGroup;
  int64_t i = 0;
  if constexpr (kStochastic) {
    for (; dense && i + kNoiseGroup <= count; i += kNoiseGroup)
      update_stochastically(e + i, p + i, k, job.seed, first_group + i / kNoiseGroup);
  } else if (dense && count >= kLanes<Arithmetic<E>>) {
    return update_nearest(
        e, p, count, k, reinterpret_cast<const E*>(job.chunks.shadow[later]),
        reinterpret_cast<const P*>(job.chunks.parameter[later]));
  }
  for (; i < count; i += kNoiseGroup) {
    E old[kNoiseGroup] = {};
    P parameter[kNoiseGroup] = {};
    const int64_t n = std::min(count - i, kNoiseGroup);
    for (int64_t j = 0; j < n; ++j) {
      old[j] = e[(i + j) * e_stride];
      parameter[j] = p[(i + j) * p_stride];
    }
    if constexpr (kStochastic) update_stochastically(old, parameter, k, job.seed, first_group + i / kNoiseGroup);
    else update_nearest<E, P>(old, parameter, kNoiseGroup, k, e, p);
    for (int64_t j = 0; j < n; ++j) e[(i + j) * e_stride] = old[j];
  }
}

template <typename E>
SK_INLINE void update_from(
    int64_t parameter_dtype, const EmaJob& job, int64_t chunk, int64_t later, const Coefficients<float>& k) {
  const auto update = [&](auto p) SK_LAMBDA {
    using P = decltype(p);
    if (sizeof(E) == 2 && job.stochastic) {
      if constexpr (sizeof(E) == 2) update_chunk<E, P, true>(job, chunk, later, k);
    } else {
      update_chunk<E, P, false>(job, chunk, later, k);
    }
  };
  parameter_dtype == kFloat ? update(float{}) : parameter_dtype == kBfloat16 ? update(bf16{}) : update(fp16{});
}

void ema_chunks(const EmaJob& job, int64_t begin, int64_t end) {
  const Coefficients<float> k = float_coefficients(job.decay);
  const Coefficients<double> wide = double_coefficients(job.decay);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t dtypes = job.chunks.dtypes[chunk], later = std::min(chunk + 2, end - 1);
    switch (dtypes % 4) {
      case kFloat: update_from<float>(dtypes / 4, job, chunk, later, k); break;
      case kBfloat16: update_from<bf16>(dtypes / 4, job, chunk, later, k); break;
      case kFloat16: update_from<fp16>(dtypes / 4, job, chunk, later, k); break;
      default: update_chunk<double, double, false>(job, chunk, later, wide);
    }
  }
}

}  // namespace smart_kernels::SK_ISA
