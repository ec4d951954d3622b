// A step of the perturbation, and its random start, over the columns [begin, end) of a unit or of everything.

#include "cpu/philox.h"

namespace smart_kernels::SK_ISA {

// f(row, column, n) over the pieces of rows that the elements [begin, end) of a unit are, g likewise where masked
template <typename F, typename G>
SK_INLINE void for_pieces(const StepJob& job, int64_t unit, int64_t begin, int64_t end, F&& f, G&& masked) {
  const int64_t cols = job.delta.cols();
  int64_t row = begin / cols, column = begin - row * cols;
  for (row += unit * job.unit_rows; begin < end; ++row) {
    const int64_t n = std::min(cols - column, end - begin);
    if (job.mask(row)) f(row, column, n);
    else masked(row, column, n);
    begin += n;
    column = 0;
  }
}
template <typename F>
SK_INLINE void for_pieces(const StepJob& job, int64_t unit, int64_t begin, int64_t end, F&& f) {
  for_pieces(job, unit, begin, end, f, [](int64_t, int64_t, int64_t) {});
}

// f(load, j) over j in [0, n): load(p) reads a vector at p + j, at the end with zeros beyond n
template <typename T, typename F>
SK_INLINE void for_vectors(int64_t n, F&& f) {
  constexpr int N = kLanes<T>;
  int64_t j = 0;
  for (; j + N <= n; j += N) f([j](const auto* p) SK_LAMBDA { return load(p + j); }, j, N);
  if (j < n) f([j, n](const auto* p) SK_LAMBDA { return load_some(p + j, int(n - j)); }, j, int(n - j));
}

typedef float HalfVec __attribute__((vector_size(SK_VECTOR_BYTES / 2)));

SK_INLINE Vec<double> widen(HalfVec x) {
#if SK_VECTOR_BYTES == 64
  return (Vec<double>)_mm512_cvtps_pd((__m256)x);
#elif SK_VECTOR_BYTES == 32
  return (Vec<double>)_mm256_cvtps_pd((__m128)x);
#else
  return __builtin_convertvector(x, Vec<double>);
#endif
}

// A sum of products, in double
template <typename T>
struct Sum {
  Vec<double> lanes[sizeof(double) / sizeof(T)] = {};

  SK_INLINE void add(Vec<T> x, Vec<T> y) {
    if constexpr (std::is_same_v<T, double>) {
      lanes[0] += x * y;
    } else {
      HalfVec a[2], b[2];
      __builtin_memcpy(a, &x, sizeof x);
      __builtin_memcpy(b, &y, sizeof y);
      for (int i = 0; i < 2; ++i) lanes[i] += widen(a[i]) * widen(b[i]);
    }
  }
  double total() const {
    double sum = 0;
    for (const Vec<double>& x : lanes) sum += reduce_add<double>(x);
    return sum;
  }
};

// The largest |x|, or a NaN where there is one: the integer of its bits is larger than any other's.
template <typename T>
struct Largest {
  Mask<T> lanes{};

  SK_INLINE void add(Vec<T> x) { lanes = vmax((Mask<T>)vabs<T>(x), lanes); }
  T total() const {
    const auto bits = reduce<T>(lanes, [](Mask<T> x, Mask<T> y) SK_LAMBDA { return vmax(x, y); });
    T x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
};

template <typename T>
SK_INLINE Vec<T> sign(Vec<T> x) {
  return x > Vec<T>{} ? set1(T(1)) : x < Vec<T>{} ? set1(T(-1)) : Vec<T>{};
}

// The squares of what float holds are all in double's range; those of double's need a scale, found first.
template <typename T, typename G>
Partial gather(const StepJob& job, int64_t unit, int64_t begin, int64_t end) {
  const auto grad = [&](int64_t row) { return static_cast<const G*>(job.grad.row(row)); };
  Partial part{0, 1, 0, 0, 0};
  Largest<T> largest;
  if (job.norm == kLinf || std::is_same_v<T, double>) {
    for_pieces(job, unit, begin, end, [&](int64_t row, int64_t column, int64_t n) SK_LAMBDA {
      const G* g = grad(row) + column;
      Largest<T> most = largest;
      for_vectors<T>(n, [&](auto load, int64_t, int) SK_LAMBDA { most.add(load(g)); });
      largest = most;
    });
    part.largest = largest.total();
    if (job.norm == kLinf) return part;
  }

  const bool signs = job.ascent == kSign;
  if (std::is_same_v<T, double> && !signs) part.scale = scale_of<T>(part.largest);
  const T scale = T(part.scale);
  Sum<T> dd, d_delta, delta_delta;
  const auto sum = [&](auto&& direction) SK_LAMBDA {
    for_pieces(job, unit, begin, end, [&](int64_t row, int64_t column, int64_t n) SK_LAMBDA {
      const G* g = grad(row) + column;
      const T* delta = static_cast<const T*>(job.delta.row(row)) + column;
      Sum<T> a = dd, b = d_delta, c = delta_delta;
      Largest<T> most = largest;
      for_vectors<T>(n, [&](auto load, int64_t, int) SK_LAMBDA {
        const Vec<T> x = load(delta), y = load(g), d = direction(y);
        if constexpr (std::is_same_v<T, float>) most.add(y);
        a.add(d, d);
        b.add(d, x);
        c.add(x, x);
      });
      dd = a, d_delta = b, delta_delta = c, largest = most;
    });
  };
  if (signs) sum([](Vec<T> g) SK_LAMBDA { return sign<T>(g); });
  else if constexpr (std::is_same_v<T, float>) sum([](Vec<T> g) SK_LAMBDA { return g; });
  else sum([scale](Vec<T> g) SK_LAMBDA { return g * scale; });
  part.largest = largest.total();
  part.dd = dd.total();
  part.d_delta = d_delta.total();
  part.delta_delta = delta_delta.total();
  return part;
}

// A store past the caches, to where nothing is worth keeping there: out must be aligned to the vector's size.
template <typename T>
SK_INLINE void stream(T* out, Vec<T> x) {
#if SK_VECTOR_BYTES == 64 && defined(__x86_64__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(out), (__m512i)x);
#elif SK_VECTOR_BYTES == 32 && defined(__x86_64__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(out), (__m256i)x);
#elif defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(out), (__m128i)x);
#else
  store(out, x);
#endif
}

template <typename T, typename G>
void apply(const StepJob& job, int64_t unit, int64_t begin, int64_t end, const Move& move) {
  const T keep = T(move.keep), scale = T(move.scale), step = T(move.step), bound = T(move.bound);
  const auto target = [&](int64_t row) { return static_cast<T*>(const_cast<void*>(job.out.row(row))); };
  const auto shift = [&](auto&& step_of) SK_LAMBDA {
    for_pieces(
        job, unit, begin, end,
        [&](int64_t row, int64_t column, int64_t n) SK_LAMBDA {
          T* out = target(row) + column;
          const T* delta = static_cast<const T*>(job.delta.row(row)) + column;
          const G* g = static_cast<const G*>(job.grad.row(row)) + column;
          const bool streamed = job.streamed && reinterpret_cast<uintptr_t>(out) % SK_VECTOR_BYTES == 0;
          for_vectors<T>(n, [&](auto load, int64_t j, int count) SK_LAMBDA {
            Vec<T> x = load(delta) * keep + step_of(load(g));
            x = vmax(set1(-bound), vmin(set1(bound), x));  // in this order, a NaN stays
            count < kLanes<T> ? store_n(out + j, x, count) : streamed ? stream(out + j, x) : store(out + j, x);
          });
        },
        [&](int64_t row, int64_t column, int64_t n) { std::fill_n(target(row) + column, n, T(0)); });
  };
  if (!move.moves) shift([&](Vec<T>) SK_LAMBDA { return Vec<T>{}; });
  else if (job.ascent == kSign) shift([&](Vec<T> g) SK_LAMBDA { return sign<T>(g) * step; });
  else shift([&](Vec<T> g) SK_LAMBDA { return (g * scale) * step; });
}

// f(delta's type, grad's type), each by an instance
template <typename F>
SK_INLINE auto with_types(const StepJob& job, F&& f) {
  switch (job.grad.dtype()) {
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::Half: return f(float{}, fp16{});
    case ScalarType::BFloat16: return f(float{}, bf16{});
    default: return f(float{}, float{});
  }
}

Partial gather_part(const StepJob& job, int64_t unit, int64_t begin, int64_t end) {
  return with_types(job, [&](auto t, auto g) { return gather<decltype(t), decltype(g)>(job, unit, begin, end); });
}

void apply_part(const StepJob& job, int64_t unit, int64_t begin, int64_t end, const Move& move) {
  with_types(job, [&](auto t, auto g) { apply<decltype(t), decltype(g)>(job, unit, begin, end, move); });
}

// The lower 32 bits of the lanes of two vectors, in one
SK_INLINE Mask<float> pack(Words low, Words high) {
  typedef int32_t Half __attribute__((vector_size(SK_VECTOR_BYTES / 2)));
  const Half halves[2] = {__builtin_convertvector(low, Half), __builtin_convertvector(high, Half)};
  Mask<float> out;
  __builtin_memcpy(&out, halves, sizeof out);
  return out;
}

// Two numbers of N(0, 1) from two words: Box and Muller's transform, each within 4 units in the last place of 1
SK_INLINE void box_muller(Mask<float> a, Mask<float> b, float* x, float* y) {
  typedef uint32_t Bits __attribute__((vector_size(SK_VECTOR_BYTES)));
  const Vec<float> uniform = __builtin_convertvector((Mask<float>)((Bits)a >> 1), Vec<float>) * 0x1p-31f + 0x1p-32f;
  const Vec<float> radius = square_root<float>(log_positive<float>(uniform) * -2.0f);
  // b 2^-32 of a turn: the nearest quarter, and what remains, exactly
  const Mask<float> quarter = (Mask<float>)((Bits)b + 0x20000000u) >> 30;
  const Vec<float> r = __builtin_convertvector((Mask<float>)((Bits)b - ((Bits)quarter << 30)), Vec<float>) * 0x1p-30f;
  // minimax, relative errors 3e-9 and 6e-11
  const Vec<float> z = r * r;
  Vec<float> sin = set1(-4.6016578911808582e-3f), cos = set1(9.0376654324233703e-4f);
  sin = sin * z + 7.9680032770421878e-2f;
  sin = sin * z - 6.4596346023342801e-1f;
  sin = (sin * z + 1.5707963217083447f) * r;
  cos = cos * z - 2.0860165111470217e-2f;
  cos = cos * z + 2.5366922596549086e-1f;
  cos = cos * z - 1.2337005425976675f;
  cos = cos * z + 1.0f;
  const Mask<float> odd = (quarter & 1) != 0;
  const Mask<float> sign_x = ((quarter + 1) & 2) << 30, sign_y = (quarter & 2) << 30;
  store(x, (Vec<float>)((Mask<float>)(radius * (odd ? sin : cos)) ^ sign_x));
  store(y, (Vec<float>)((Mask<float>)(radius * (odd ? cos : sin)) ^ sign_y));
}

// The 64 numbers of a group. Counter 16 group + i makes the numbers i, i + 16, i + 32 and i + 48.
SK_INLINE void noise_group(uint64_t seed, uint64_t group, float* out) {
  constexpr int N = kLanes<float>, half = N / 2;
  Words lane;
  for (int i = 0; i < half; ++i) lane[i] = i;
  for (int first = 0; first < 16; first += N) {
    const Words counter = lane + (group * 16 + first);
    const Random low = philox(seed, counter), high = philox(seed, counter + half);
    for (int i = 0; i < 4; i += 2)
      box_muller(pack(low.words[i], high.words[i]), pack(low.words[i + 1], high.words[i + 1]),
                 out + 16 * i + first, out + 16 * (i + 1) + first);
  }
}

template <typename T>
void noise(const InitJob& job, int64_t first_group, int64_t last_group) {
  const T std = T(job.std);
  float normal[kNoiseGroup];
  for (int64_t group = first_group; group < last_group; ++group) {
    int64_t i = group * kNoiseGroup;
    const int64_t end = std::min(i + kNoiseGroup, job.numel);
    const bool one_row = i / job.cols == (end - 1) / job.cols;
    if (!one_row || job.mask(i / job.cols)) noise_group(job.seed, group, normal);
    for (const float* z = normal; i < end;) {
      const int64_t row = i / job.cols, n = std::min((row + 1) * job.cols, end) - i;
      T* out = static_cast<T*>(job.out) + i;
      if (job.mask(row))
        for (int64_t j = 0; j < n; ++j) out[j] = T(z[j]) * std;
      else
        std::fill_n(out, n, T(0));
      i += n;
      z += n;
    }
  }
}

void noise_groups(const InitJob& job, int64_t begin, int64_t end) {
  if (job.dtype == ScalarType::Double) noise<double>(job, begin, end);
  else noise<float>(job, begin, end);
}

}  // namespace smart_kernels::SK_ISA
