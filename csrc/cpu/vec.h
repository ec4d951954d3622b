// Vectors of the width of the instruction set at hand, on the compiler's own vector types, and the maths the
// kernels share. Included once per instruction set by foreach_isa.h.

#undef SK_INLINE
#undef SK_LAMBDA
#define SK_INLINE inline __attribute__((always_inline))
#define SK_LAMBDA __attribute__((always_inline))

namespace smart_kernels::SK_ISA {

template <typename T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float V __attribute__((vector_size(SK_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(SK_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double V __attribute__((vector_size(SK_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(SK_VECTOR_BYTES)));
};
template <typename T>
using Vec = typename VecOf<T>::V;
// Lane masks (all bits set or none) and the bits of a Vec<T>
template <typename T>
using Mask = typename VecOf<T>::I;
template <typename T>
constexpr int kLanes = SK_VECTOR_BYTES / sizeof(T);

template <typename T>
SK_INLINE Vec<T> set1(T x) {
  return x - Vec<T>{};  // x + 0 would lose the sign of -0
}
template <typename T>
SK_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
SK_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
// A mask of the first n lanes
template <typename T>
SK_INLINE Mask<T> first_lanes(int n) {
  Mask<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < n;
}
// The first n lanes from memory, the others `fill`
template <typename T>
SK_INLINE Vec<T> load_n(const T* p, int n, T fill) {
  Vec<T> v = set1(fill);
#if SK_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) return (Vec<T>)_mm512_mask_loadu_ps((__m512)v, (1u << n) - 1, p);
  else return (Vec<T>)_mm512_mask_loadu_pd((__m512d)v, (1u << n) - 1, p);
#elif SK_VECTOR_BYTES == 32
  const Mask<T> wanted = first_lanes<T>(n);
  if constexpr (std::is_same_v<T, float>) v = wanted ? (Vec<T>)_mm256_maskload_ps(p, (__m256i)wanted) : v;
  else v = wanted ? (Vec<T>)_mm256_maskload_pd(p, (__m256i)wanted) : v;
  return v;
#endif
  __builtin_memcpy(&v, p, n * sizeof(T));
  return v;
}
template <typename T>
SK_INLINE void store_n(T* p, Vec<T> v, int n) {
#if SK_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
  else return _mm512_mask_storeu_pd(p, (1u << n) - 1, (__m512d)v);
#elif SK_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<T, float>) return _mm256_maskstore_ps(p, (__m256i)first_lanes<T>(n), (__m256)v);
  else return _mm256_maskstore_pd(p, (__m256i)first_lanes<T>(n), (__m256d)v);
#endif
  __builtin_memcpy(p, &v, n * sizeof(T));
}

// bfloat16 and float16 are held as their bits: arithmetic is float's.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
typedef uint16_t Bits16 __attribute__((vector_size(SK_VECTOR_BYTES / 2)));

template <typename T>
SK_INLINE T number(T x) {
  return x;
}
SK_INLINE float number(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float number;
  __builtin_memcpy(&number, &bits, sizeof number);
  return number;
}

#if SK_VECTOR_BYTES == 64
// 16 bf16 as floats, and back: by one permutation of 16-bit words, where a conversion of words takes two instructions
SK_INLINE Vec<float> widened(__m256i words) {
  const Mask<float> place = Mask<float>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} << 16;
  return (Vec<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)place, _mm512_castsi256_si512(words));
}
SK_INLINE __m256i narrowed(Vec<float> x) {
  const __m512i table = _mm512_set1_epi32(0x33);  // quiet and signalling NaN: one that rounding leaves; all else stays
  const Mask<float> bits = (Mask<float>)_mm512_fixupimm_ps((__m512)x, (__m512)x, table, 0);
  const Mask<float> rounded = bits + (((bits >> 16) & 1) + 0x7fff);
  const Mask<float> place = {0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d};
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16((__m512i)place, (__m512i)rounded));
}
#endif
SK_INLINE Vec<float> load(const bf16* p) {
#if SK_VECTOR_BYTES == 64
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif SK_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  Bits16 bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (Vec<float>)(__builtin_convertvector(bits, Mask<float>) << 16);
#endif
}
SK_INLINE Vec<float> load(const fp16* p) {
#if SK_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif SK_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // The exponent is rebased by a multiplication, exact also for subnormals; that of inf and NaN is all ones.
  Bits16 half;
  __builtin_memcpy(&half, p, sizeof half);
  const Mask<float> bits = __builtin_convertvector(half, Mask<float>), magnitude = (bits & 0x7fff) << 13;
  const Mask<float> scaled = (Mask<float>)((Vec<float>)magnitude * 0x1p112f);
  const Mask<float> special = magnitude >= (0x7c00 << 13) ? Mask<float>{} + 0x7f800000 : Mask<float>{};
  return (Vec<float>)(scaled | special | (bits & 0x8000) << 16);
#endif
}
// Rounded to nearest, ties to even
SK_INLINE void store(bf16* p, Vec<float> x) {
#if SK_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(x));
#else
  const Mask<float> bits = (Mask<float>)x, odd = (bits >> 16) & 1;
  const Mask<float> rounded = x == x ? bits + (odd + 0x7fff) : Mask<float>{} + 0x7fc00000;
#if SK_VECTOR_BYTES == 32
  const __m256i upper = _mm256_srli_epi32((__m256i)rounded, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
  const Bits16 half = __builtin_convertvector((rounded >> 16) & 0xffff, Bits16);
  __builtin_memcpy(p, &half, sizeof half);
#endif
#endif
}
SK_INLINE void store(fp16* p, Vec<float> x) {
#if SK_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif SK_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  // A number that starts at 2^13 times the last place of the result rounds the sum there: its lowest bits are the
  // half's mantissa, at least 2^-14's for subnormals. What overflows is infinite.
  const Mask<float> sign = (Mask<float>)x & INT32_MIN;
  const Vec<float> magnitude = (Vec<float>)((Mask<float>)x & INT32_MAX);
  const Mask<float> exponent = (Mask<float>)magnitude & 0x7f800000;
  const Mask<float> floor = Mask<float>{} + (113 << 23);
  const Mask<float> base = (exponent > floor ? exponent : floor) + (13 << 23);
  const Mask<float> mantissa = (Mask<float>)(magnitude + (Vec<float>)base) - base;
  Mask<float> half = ((base - ((113 + 13) << 23)) >> 13) + mantissa;
  half = magnitude >= 65520.0f ? Mask<float>{} + 0x7c00 : half;
  half = x == x ? half : Mask<float>{} + 0x7e00;
  const Bits16 bits = __builtin_convertvector((half | (sign >> 16)) & 0xffff, Bits16);
  __builtin_memcpy(p, &bits, sizeof bits);
#endif
}
// n < kLanes of any of the four dtypes
template <typename S>
SK_INLINE auto load_some(const S* p, int n) {
  S lanes[sizeof(S) == 8 ? kLanes<double> : kLanes<float>] = {};
  __builtin_memcpy(lanes, p, n * sizeof(S));
  return load(static_cast<const S*>(lanes));
}
template <typename S, typename V>
SK_INLINE void store_some(S* p, V x, int n) {
  S lanes[sizeof(S) == 8 ? kLanes<double> : kLanes<float>];
  store(lanes, x);
  __builtin_memcpy(p, lanes, n * sizeof(S));
}
SK_INLINE Vec<float> load_n(const bf16* p, int n, float fill) {
#if SK_VECTOR_BYTES == 64
  const __mmask16 wanted = (1u << n) - 1;
  return (Vec<float>)_mm512_mask_mov_ps((__m512)set1(fill), wanted, (__m512)widened(_mm256_maskz_loadu_epi16(wanted, p)));
#else
  return first_lanes<float>(n) ? load_some(p, n) : set1(fill);
#endif
}
SK_INLINE void store_n(bf16* p, Vec<float> x, int n) {
#if SK_VECTOR_BYTES == 64
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, narrowed(x));
#else
  store_some(p, x, n);
#endif
}

// b where one of both is NaN, which is what the instructions do; compilers make two of the comparison's form.
template <typename V>
SK_INLINE V vmax(V a, V b) {
#if SK_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (std::is_same_v<V, Vec<double>>) return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif SK_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm256_max_ps((__m256)a, (__m256)b);
  if constexpr (std::is_same_v<V, Vec<double>>) return (V)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__x86_64__)
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm_max_ps((__m128)a, (__m128)b);
  if constexpr (std::is_same_v<V, Vec<double>>) return (V)_mm_max_pd((__m128d)a, (__m128d)b);
#endif
  return a > b ? a : b;
}
template <typename V>
SK_INLINE V vmin(V a, V b) {
#if SK_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm512_min_ps((__m512)a, (__m512)b);
  if constexpr (std::is_same_v<V, Vec<double>>) return (V)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif SK_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm256_min_ps((__m256)a, (__m256)b);
  if constexpr (std::is_same_v<V, Vec<double>>) return (V)_mm256_min_pd((__m256d)a, (__m256d)b);
#elif defined(__x86_64__)
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm_min_ps((__m128)a, (__m128)b);
  if constexpr (std::is_same_v<V, Vec<double>>) return (V)_mm_min_pd((__m128d)a, (__m128d)b);
#endif
  return a < b ? a : b;
}
// x as it would be stored: the compiler may not fuse its last multiplication with what is added to it
template <typename V>
SK_INLINE V rounded(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}
template <typename T>
SK_INLINE Vec<T> vabs(Vec<T> x) {
  return (Vec<T>)((Mask<T>)x & std::numeric_limits<std::remove_reference_t<decltype(Mask<T>{}[0])>>::max());
}

// sqrt(x) of a finite number >= 0, to 0.9 (0.5) units; by a step of Newton's where the instruction takes long.
template <typename T>
SK_INLINE Vec<T> square_root(Vec<T> x) {
#if SK_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    const __mmask16 some = _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const Vec<T> y = (Vec<T>)_mm512_maskz_rsqrt14_ps(some, (__m512)x), root = x * y;
    return root + root * (T(0.5) - T(0.5) * y * root);
  }
#endif
  for (int i = 0; i < kLanes<T>; ++i) x[i] = std::sqrt(x[i]);
  return x;
}
// 1 / x of a normal number of which the reciprocal is one, to 1 (0.5)
template <typename T>
SK_INLINE Vec<T> reciprocal(Vec<T> x) {
#if SK_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    const Vec<T> y = (Vec<T>)_mm512_rcp14_ps((__m512)x);
    return y + y * (T(1) - x * y);
  }
#endif
  return T(1) / x;
}

// All lanes by one operation, halves with each other: the serial way takes as long as a hundred elements.
template <int step, typename V, size_t... lane>
SK_INLINE V swap_lanes(V v, std::index_sequence<lane...>) {
  return __builtin_shufflevector(v, v, int(lane ^ step)...);
}
template <typename T, int step = kLanes<T> / 2, typename V, typename F>
SK_INLINE auto reduce(V v, F&& f) {
  if constexpr (step == 0) return v[0];
  else return reduce<T, step / 2>(f(v, swap_lanes<step>(v, std::make_index_sequence<kLanes<T>>())), f);
}
template <typename T>
SK_INLINE T reduce_add(Vec<T> v) {
  return reduce<T>(v, [](Vec<T> x, Vec<T> y) SK_LAMBDA { return x + y; });
}
template <typename T>
SK_INLINE T reduce_max(Vec<T> v) {
  return reduce<T>(v, [](Vec<T> x, Vec<T> y) SK_LAMBDA { return vmax(x, y); });
}
template <typename T>
SK_INLINE T reduce_min(Vec<T> v) {
  return reduce<T>(v, [](Vec<T> x, Vec<T> y) SK_LAMBDA { return vmin(x, y); });
}
template <typename T>
SK_INLINE bool any(Mask<T> m) {
#if SK_VECTOR_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0;
#elif SK_VECTOR_BYTES == 32
  return !_mm256_testz_si256((__m256i)m, (__m256i)m);
#else
  auto bits = m[0];
  for (int i = 1; i < kLanes<T>; ++i) bits |= m[i];
  return bits != 0;
#endif
}

// The lanes of x[i] and x[i + step] whose place has that bit are exchanged crosswise: one stage of a transposition.
template <typename T, int step, bool upper, size_t... lane>
SK_INLINE Vec<T> cross(Vec<T> x, Vec<T> y, std::index_sequence<lane...>) {
  // upper: from x its lanes with the bit set, then y's; lower: x's without it, then y's
  return __builtin_shufflevector(
      x, y,
      (upper ? ((lane & step) ? int(lane) + kLanes<T> : int(lane) + step)
             : ((lane & step) ? int(lane) - step + kLanes<T> : int(lane)))...);
}
template <typename T, int step = 1>
SK_INLINE void transpose(Vec<T>* x) {
#if SK_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<T, float>) {  // every exchange by one instruction, which the general way is not
    Vec<T> y[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      y[i] = (Vec<T>)_mm256_unpacklo_ps((__m256)x[i], (__m256)x[i + 1]);
      y[i + 1] = (Vec<T>)_mm256_unpackhi_ps((__m256)x[i], (__m256)x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {  // columns i and i + 4 of rows i to i + 3, and so on
      x[i] = (Vec<T>)_mm256_shuffle_ps((__m256)y[i], (__m256)y[i + 2], 0x44);
      x[i + 1] = (Vec<T>)_mm256_shuffle_ps((__m256)y[i], (__m256)y[i + 2], 0xee);
      x[i + 2] = (Vec<T>)_mm256_shuffle_ps((__m256)y[i + 1], (__m256)y[i + 3], 0x44);
      x[i + 3] = (Vec<T>)_mm256_shuffle_ps((__m256)y[i + 1], (__m256)y[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec<T> lower = (Vec<T>)_mm256_permute2f128_ps((__m256)x[i], (__m256)x[i + 4], 0x20);
      x[i + 4] = (Vec<T>)_mm256_permute2f128_ps((__m256)x[i], (__m256)x[i + 4], 0x31);
      x[i] = lower;
    }
    return;
  }
#endif
  if constexpr (step < kLanes<T>) {
#pragma GCC unroll 32
    for (int i = 0; i < kLanes<T>; ++i)
      if (!(i & step)) {
        constexpr auto lanes = std::make_index_sequence<kLanes<T>>();
        const Vec<T> lower = cross<T, step, false>(x[i], x[i + step], lanes);
        x[i + step] = cross<T, step, true>(x[i], x[i + step], lanes);
        x[i] = lower;
      }
    transpose<T, 2 * step>(x);
  }
}

// Errors are those of floats, in units in the last place, with fused multiply-adds (without): tests/test_vector_maths.py.

// exp(x) - 1 - x = x^2 P(x) for |x| <= 0.5, to 8e-8 of it (double: 2e-16) before rounding.
template <typename T>
SK_INLINE Vec<T> excess_small(Vec<T> x) {
  Vec<T> p;
  if constexpr (std::is_same_v<T, float>) {
    p = set1(1.9849814572305420e-4f);
    p = p * x + 1.3996176313225246e-3f;
    p = p * x + 8.3335790166981994e-3f;
    p = p * x + 4.1665358598777233e-2f;
    p = p * x + 1.6666663985703641e-1f;
    p = p * x + 5.0000003853157625e-1f;
  } else {
    p = set1(1.6060237427842429230e-10);
    p = p * x + 2.0969583784729333315e-9;
    p = p * x + 2.5052366549310857575e-8;
    p = p * x + 2.7557031245569488188e-7;
    p = p * x + 2.7557318263706695110e-6;
    p = p * x + 2.4801587728982703836e-5;
    p = p * x + 1.9841269842635576117e-4;
    p = p * x + 1.3888888888582243434e-3;
    p = p * x + 8.3333333333325246135e-3;
    p = p * x + 4.1666666666667598685e-2;
    p = p * x + 1.6666666666666668210e-1;
    p = p * x + 4.9999999999999999218e-1;
  }
  return (x * x) * p;
}

// exp(x) - 1 for |x| <= 0.5, to 0.94 (1.09); minimax, 3e-9 of it (double: 4e-19) before rounding.
template <typename T>
SK_INLINE Vec<T> expm1_small(Vec<T> x) {
  return excess_small<T>(x) + x;
}

// exp(x) for |x| <= ln 2 / 2, to 0.74 (1.02); 1 for 0.
template <typename T>
SK_INLINE Vec<T> exp_small(Vec<T> x) {
  if constexpr (std::is_same_v<T, float>) {
    Vec<T> p = set1(1.3821459142491221e-3f);
    p = p * x + 8.3686625584959984e-3f;
    p = p * x + 4.1668254882097244e-2f;
    p = p * x + 1.6666521131992340e-1f;
    p = p * x + 4.9999994039535522e-1f;
    p = p * x + 1.0f;
    return p * x + 1.0f;
  } else {
    return expm1_small<T>(x) + T(1);
  }
}

// exp(x) for x <= 80, to 0.91 (1.18), by vectors of 64 bytes to 1.07; 0 below the smallest normal result; anything for NaN.
template <typename T>
SK_INLINE Vec<T> exponential(Vec<T> x) {
  constexpr bool f = std::is_same_v<T, float>;
  constexpr T log2_e = T(1.4426950408889634074), lowest = f ? T(-87.33654) : T(-708.3964185322641);
  // ln 2 in two parts, the first with so few bits that a whole number times it is exact
  constexpr T high = f ? T(0.693359375) : T(6.93147180369123816490e-1);
  constexpr T low = f ? T(-2.12194440054690583e-4) : T(1.90821492927058770002e-10);
#if SK_VECTOR_BYTES == 64
  if constexpr (f) {
    // In sixteenths of a power of 2, the last four bits of which choose a root: a shorter way than a longer polynomial
    const Vec<T> roots = {1.0f, 1.0442737f, 1.0905077f, 1.1387886f, 1.1892071f, 1.2418578f, 1.2968396f, 1.3542556f,
                          1.4142135f, 1.4768262f, 1.5422108f, 1.6104903f, 1.6817929f, 1.7562522f, 1.8340081f, 1.9152066f};
    constexpr T round = T(786432.0);  // 1.5 * 2^19
    const Vec<T> shifted = x * log2_e + round, n = shifted - round;
    const Vec<T> r = (x - n * high) - n * low, less_1 = r + r * r * (0.5f + r * 0.16666667f);
    const Vec<T> root = (Vec<T>)_mm512_permutexvar_ps((__m512i)shifted, (__m512)roots);
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(lowest), _CMP_NLT_UQ);
    return (Vec<T>)_mm512_maskz_scalef_ps(normal, (__m512)(root + root * less_1), (__m512)n);
  }
#endif
  constexpr T round = f ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^mantissa: adding it rounds to an integer
  constexpr int mantissa = f ? 23 : 52;
  const Vec<T> shifted = x * log2_e + round;
  const Vec<T> n = shifted - round;
  const Vec<T> r = (x - n * high) - n * low;
  const Vec<T> y = exp_small<T>(r);
  const Mask<T> exponent = (Mask<T>)shifted << mantissa;  // the bits of `round` itself are shifted out
  return x < lowest ? Vec<T>{} : (Vec<T>)((Mask<T>)y + exponent);
}

// k ln 2 + log(1 + f), for f in [sqrt(1/2) - 1, sqrt(2) - 1]: f - f^2/2 + f^3 P(f)
SK_INLINE Vec<float> log_of_parts(Vec<float> k, Vec<float> f) {
  Vec<float> p = set1(0.0691558081164f);
  p = p * f - 0.117898789487f;
  p = p * f + 0.118729159102f;
  p = p * f - 0.1238433226f;
  p = p * f + 0.142186647486f;
  p = p * f - 0.166692520008f;
  p = p * f + 0.200022262824f;
  p = p * f - 0.249999865727f;
  p = p * f + 0.333333104459f;
  Vec<float> y = p * f * f * f + k * -2.12194440e-4f;
  y = y - 0.5f * f * f;
  return k * 0.693359375f + (f + y);
}

__attribute__((noinline)) inline Vec<double> log_lanes(Vec<double> x, Vec<double> y, Mask<double> near) {
  for (int i = 0; i < kLanes<double>; ++i) y[i] = near[i] ? std::log1p(y[i]) : std::log(x[i]);
  return y;
}

// log(x) of a positive normal number, to 0.75 (0.85), or where `near` log(1 + y), for y in [-1/4, 1/4], to as much.
template <typename T>
SK_INLINE Vec<T> log_positive(Vec<T> x, Vec<T> y = Vec<T>{}, Mask<T> near = Mask<T>{}) {
  if constexpr (std::is_same_v<T, float>) {
    // x = 2^k m, m in [sqrt(1/2), sqrt(2))
    const Mask<T> bits = (Mask<T>)x - 0x3f3504f3;
    const Vec<T> k = __builtin_convertvector(bits >> 23, Vec<T>);
    const Vec<T> f = (Vec<T>)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    return log_of_parts(near ? Vec<T>{} : k, near ? y : f);
  } else {
    return log_lanes(x, y, near);
  }
}

// log(1 + x) for x > -1, to 2.5: what the rounding of 1 + x drops is put back as the quotient x / ((1 + x) - 1)
template <typename T>
SK_INLINE Vec<T> log1p(Vec<T> x) {
  if constexpr (std::is_same_v<T, float>) {
    const Vec<T> u = x + T(1), kept = u - T(1);
    return kept == Vec<T>{} ? x : log_positive<T>(u) * (x / kept);
  } else {
    Vec<T> y;
    for (int i = 0; i < kLanes<T>; ++i) y[i] = std::log1p(x[i]);
    return y;
  }
}

}  // namespace smart_kernels::SK_ISA
