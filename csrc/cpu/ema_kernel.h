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
#if SK_VECTOR_BYTES == 64
SK_INLINE bool all_less(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ) == 0xffff;
}
SK_INLINE bool all_at_most(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ) == 0xffff;
}
SK_INLINE bool all_at_most(Vec<double> a, Vec<double> b) {
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LE_OQ) == 0xff;
}
#else
SK_INLINE bool all_less(Vec<float> a, Vec<float> b) { return !any<float>(~(a < b)); }
SK_INLINE bool all_at_most(Vec<float> a, Vec<float> b) { return !any<float>(~(a <= b)); }
SK_INLINE bool all_at_most(Vec<double> a, Vec<double> b) { return !any<double>(~(a <= b)); }
#endif

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

// A decay of 0 is a copy
template <bool kCopy, typename E, typename P>
SK_INLINE auto moved(const E* e, const P* p, const Coefficients<Arithmetic<E>>& k) {
  if constexpr (kCopy) return load(p);
  else return move_towards<sizeof(E) == 2>(load(e), load(p), k);
}

// Of some vectors side by side. Where one in a few moves far, a branch for each would be predicted badly.
constexpr int kTogether = 4;
template <bool kCopy, typename E, typename P>
SK_INLINE void move_together(E* e, const P* p, const Coefficients<Arithmetic<E>>& k) {
  constexpr int N = kLanes<Arithmetic<E>>;
  constexpr bool kNarrow = sizeof(E) == 2;
  if constexpr (kCopy) {
    for (int j = 0; j < kTogether; ++j) store(e + j * N, load(p + j * N));
    return;
  }
  Vec<Arithmetic<E>> from[kTogether], to[kTogether];
  bool little = true;
#pragma GCC unroll 4
  for (int j = 0; j < kTogether; ++j) {
    from[j] = load(static_cast<const E*>(e + j * N));
    to[j] = load(p + j * N);
    little &= moves_little<kNarrow>(from[j], to[j], k);
  }
  if (little)
#pragma GCC unroll 4
    for (int j = 0; j < kTogether; ++j) store(e + j * N, plain_move(from[j], to[j], k));
  else
    for (int j = 0; j < kTogether; ++j) store(e + j * N, any_move<kNarrow>(from[j], to[j], k));
}

// Of elements that lie dense. The last vector overlaps the one before it: it is taken before that is stored.
// Meanwhile memory that comes later, if it is given, is asked for.
template <bool kCopy, typename E, typename P>
SK_INLINE void update_nearest(
    E* e, const P* p, int64_t count, Coefficients<Arithmetic<E>> k, const E* later_e = nullptr, const P* later_p = nullptr) {
  constexpr int N = kLanes<Arithmetic<E>>;
  const int64_t tail = count - N;
  const auto last = moved<kCopy>(static_cast<const E*>(e + tail), p + tail, k);
  int64_t i = 0;
  for (; i + (kTogether - 1) * N < tail; i += kTogether * N) {
    if (later_e)
      for (int j = 0; j < kTogether; ++j) {
        __builtin_prefetch(later_e + i + j * N, 0, 2);
        __builtin_prefetch(later_p + i + j * N, 0, 2);
      }
    move_together<kCopy>(e + i, p + i, k);
  }
  for (; i < tail; i += N) store(e + i, moved<kCopy>(static_cast<const E*>(e + i), p + i, k));
  store(e + tail, last);
}

// Of a whole group
template <bool kCopy, typename E, typename P>
SK_INLINE void update_stochastically(E* e, const P* p, Coefficients<float> k, uint64_t seed, uint64_t group) {
  uint32_t random[kNoiseGroup];
  random_words(seed, group, random);
  for (int i = 0; i < kNoiseGroup; i += kLanes<float>)
    store_stochastically(e + i, moved<kCopy>(static_cast<const E*>(e + i), p + i, k), random + i);
}

template <bool kCopy, bool kStochastic, typename E, typename P>
void update_chunk(const EmaJob& job, int64_t chunk, int64_t later, const Coefficients<Arithmetic<E>>& k) {
  E* e = reinterpret_cast<E*>(job.chunks.shadow[chunk]);
  const P* p = reinterpret_cast<const P*>(job.chunks.parameter[chunk]);
  const int64_t count = job.chunks.count[chunk];
  const int64_t e_stride = job.chunks.shadow_stride[chunk], p_stride = job.chunks.parameter_stride[chunk];
  if constexpr (kCopy && std::is_same_v<E, P>) {  // to the bit, NaNs too
    for (int64_t i = 0; i < count; ++i) e[i * e_stride] = p[i * p_stride];
    return;
  }
  const bool dense = e_stride == 1 && p_stride == 1;
  const uint64_t first_group = job.chunks.start[chunk] / kNoiseGroup;
  int64_t i = 0;
  if constexpr (kStochastic) {
    for (; dense && i + kNoiseGroup <= count; i += kNoiseGroup)
      update_stochastically<kCopy>(e + i, p + i, k, job.seed, first_group + i / kNoiseGroup);
  } else if (dense && count >= kLanes<Arithmetic<E>>) {
    // The hardware finds the way through a large tensor, through narrow ones not as well, but not from one small tensor
    // to the next: all of theirs is asked for, into L2.
    const E* later_e = reinterpret_cast<const E*>(job.chunks.shadow[later]);
    if (sizeof(E) > 2 && later_e == e + (later - chunk) * count) return update_nearest<kCopy>(e, p, count, k);
    return update_nearest<kCopy>(e, p, count, k, later_e, reinterpret_cast<const P*>(job.chunks.parameter[later]));
  }
  for (; i < count; i += kNoiseGroup) {
    E old[kNoiseGroup] = {};
    P parameter[kNoiseGroup] = {};
    const int64_t n = std::min(count - i, kNoiseGroup);
    for (int64_t j = 0; j < n; ++j) {
      old[j] = e[(i + j) * e_stride];
      parameter[j] = p[(i + j) * p_stride];
    }
    if constexpr (kStochastic)
      update_stochastically<kCopy>(old, parameter, k, job.seed, first_group + i / kNoiseGroup);
    else
      update_nearest<kCopy, E, P>(old, parameter, kNoiseGroup, k);
    for (int64_t j = 0; j < n; ++j) e[(i + j) * e_stride] = old[j];
  }
}

template <bool kStochastic, typename E, typename P>
SK_INLINE void update(const EmaJob& job, int64_t chunk, int64_t later, const Coefficients<Arithmetic<E>>& k) {
  if (k.decay == 0) update_chunk<true, kStochastic, E, P>(job, chunk, later, k);
  else update_chunk<false, kStochastic, E, P>(job, chunk, later, k);
}

template <typename E>
SK_INLINE void update_from(
    int64_t parameter_dtype, const EmaJob& job, int64_t chunk, int64_t later, const Coefficients<float>& k) {
  const auto from = [&](auto p) SK_LAMBDA {
    using P = decltype(p);
    if (sizeof(E) == 2 && job.stochastic) {
      if constexpr (sizeof(E) == 2) update<true, E, P>(job, chunk, later, k);
    } else {
      update<false, E, P>(job, chunk, later, k);
    }
  };
  parameter_dtype == kFloat ? from(float{}) : parameter_dtype == kBfloat16 ? from(bf16{}) : from(fp16{});
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
      default: update<false, double, double>(job, chunk, later, wide);
    }
  }
}

}  // namespace smart_kernels::SK_ISA
