// Symmetric KL of rows of logits a, b with p = softmax(a), q = softmax(b), t = log(p / q):
//
//   loss = sum (p - q) t,   d loss/da = p (t - KL(p||q)) + (p - q),   d loss/db = -q (t + KL(q||p)) - (p - q)
//
// without a difference of log-softmaxes: d = a - b is centred on the value it has where b is largest,
//
//   s = log1p(sum q expm1(d)) = logsumexp(a) - logsumexp(b),   t = d - s,   p - q = q expm1(t).
//
// A row is "near" where all |d| <= 1/2: there everything follows from q and expm1(d). Elsewhere both softmaxes are
// taken, s is the logarithm of their sums' ratio, and p - q is their plain difference where |t| > 1/2.
// The loss is summed as (p - q) t: each term >= 0, so nothing cancels.
//
// Long rows go vector by vector, reading the row three times (from L2 but for the first); rows of up to
// kMaxTransposed classes are turned so that each lane holds a row of its own.

namespace smart_kernels::SK_ISA {

template <typename T>
constexpr T kNear = T(0.5);
template <typename T>
constexpr T kInf = std::numeric_limits<T>::infinity();
template <typename T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
// Sums run in vectors of T over so many elements and then in double, so that a long row costs no digits.
constexpr int64_t kSegment = 4096;
constexpr int64_t kMaxTransposed = 96;  // of which what is kept fits in the first cache
// Longer rows are done several together, as many as have so many elements at most.
constexpr int64_t kTogether = 2048;
constexpr int kMaxTogether = 8;

// f(checked, j, n) over the columns [begin, end): full vectors, then a remainder of n lanes, which is checked;
// with `masked` all are. A checked vector may hold absent classes: -inf on both sides.
template <typename T, typename F>
SK_INLINE void for_columns(int64_t begin, int64_t end, bool masked, F&& f) {
  constexpr int N = kLanes<T>;
  int64_t j = begin;
  if (masked)
    for (; j + N <= end; j += N) f(std::true_type{}, j, N);
  else
    for (; j + N <= end; j += N) f(std::false_type{}, j, N);
  if (j < end) f(std::true_type{}, j, static_cast<int>(end - j));
}

// The first n lanes, all of them written as one
template <typename T>
SK_INLINE void put(T* p, Vec<T> x, int n) {
  n == kLanes<T> ? store(p, x) : store_n(p, x, n);
}

template <typename T>
struct Pair {
  Vec<T> a, b, d;   // d = a - b, not centred; 0 for an absent class
  Mask<T> absent;
};

template <typename T, bool checked>
SK_INLINE Pair<T> load_pair(const T* a, const T* b, int64_t j, int n) {
  Pair<T> x;
  if constexpr (checked) {
    x.a = load_n(a + j, n, -kInf<T>);
    x.b = load_n(b + j, n, -kInf<T>);
    x.absent = (x.a == -kInf<T>) & (x.b == -kInf<T>);
    x.d = x.absent ? Vec<T>{} : x.a - x.b;
  } else {
    x.a = load(a + j);
    x.b = load(b + j);
    x.d = x.a - x.b;
  }
  return x;
}

// What one look at a row tells: the largest logits, d where b is largest, how far d strays from there.
template <typename T>
struct Survey {
  T max_a, max_b, centre, spread;
  bool finite;
};

template <typename T>
Survey<T> survey(const T* a, const T* b, int64_t cols, bool masked) {
  Vec<T> max_a = set1(-kInf<T>), max_b = max_a, centre{}, low = set1(kInf<T>), high = max_a;
  Mask<T> odd{};
  for_columns<T>(0, cols, masked, [&](auto checked, int64_t j, int n) SK_LAMBDA {
    const Pair<T> x = load_pair<T, checked>(a, b, j, n);
    const Mask<T> larger = x.b > max_b;
    max_a = vmax(x.a, max_a);
    centre = larger ? x.d : centre;
    max_b = larger ? x.b : max_b;
    odd |= ~(vabs<T>(x.d) < kInf<T>);
    low = vmin(checked ? (x.absent ? low : x.d) : x.d, low);
    high = vmax(checked ? (x.absent ? high : x.d) : x.d, high);
  });
  const T top = reduce_max<T>(max_b), at = reduce_min<T>(max_b == top ? centre : kInf<T>);
  const T spread = std::max(reduce_max<T>(high) - at, at - reduce_min<T>(low));
  return {reduce_max<T>(max_a), top, at, spread, !any<T>(odd)};
}

enum class Kind { finite, masked, infinite, undefined };

// A row with a difference that is not finite: classes masked on both sides, on one, or no distribution at all.
template <typename T>
Kind classify(const T* a, const T* b, int64_t cols) {
  bool one_sided = false, any_a = false, any_b = false;
  for (int64_t j = 0; j < cols; ++j) {
    if (!(a[j] < kInf<T>) || !(b[j] < kInf<T>)) return Kind::undefined;
    any_a |= a[j] != -kInf<T>;
    any_b |= b[j] != -kInf<T>;
    one_sided |= (a[j] == -kInf<T>) != (b[j] == -kInf<T>);
  }
  return !any_a || !any_b ? Kind::undefined : one_sided ? Kind::infinite : Kind::masked;
}

// How gradients are asked for: a factor on them, and which. Either way there is room for both, where exponentials wait.
template <typename T>
struct Wanted {
  T scale;
  bool detach, input_grad, target_grad;
  T *grad_a, *grad_b;
};

// A row of any length on its way: what is asked for, and what each stage finds out. Few serve all rows in turn.
template <typename T>
struct LongRow {
  const T *a, *b;
  Wanted<T> want;
  bool counts;          // still: there is something to find out
  T loss = 0;
  bool masked = false;  // some classes are absent
  Survey<T> at{};
  double sum_a = 0, sum_b = 0, drift = 0, p_d = 0, q_d = 0;
  T inv_a = 0, inv_b = 0;          // p = exp(a - max_a) inv_a, q = exp(b - max_b) inv_b
  T s = 0, ratio = 0, offset = 0;  // t = (a - b - centre) - s; near: exp(-s), expm1(-s)
  T kl_pq = 0, kl_qp = 0;

  bool near() const { return at.spread <= kNear<T>; }
  void settle(T its_loss, T gradient, int64_t cols) {
    counts = false;
    loss = its_loss;
    std::fill_n(want.grad_a, cols, gradient);
    std::fill_n(want.grad_b, cols, gradient);
  }
};

template <typename T>
void look(LongRow<T>& row, int64_t cols) {
  row.masked = false;
  row.at = survey(row.a, row.b, cols, false);
  if (row.at.finite) return;
  const Kind kind = classify(row.a, row.b, cols);
  if (kind == Kind::infinite || kind == Kind::undefined)
    return row.settle(kind == Kind::infinite ? kInf<T> : kNan<T>, kNan<T>, cols);
  row.masked = kind == Kind::masked;
  row.at = survey(row.a, row.b, cols, row.masked);
}

// The sums over a row. The exponentials are kept for `finish`.
template <typename T, bool near>
void gather(LongRow<T>& row, int64_t cols) {
  row.sum_a = row.sum_b = row.drift = row.p_d = row.q_d = 0;
  const Survey<T> at = row.at;
  T *const exp_a = row.want.grad_a, *const exp_b = row.want.grad_b;
  for (int64_t begin = 0; begin < cols; begin += kSegment) {
    Vec<T> va{}, vb{}, vdrift{}, vp{}, vq{};
    const int64_t end = std::min(begin + kSegment, cols);
    for_columns<T>(begin, end, row.masked, [&, a = row.a, b = row.b](auto checked, int64_t j, int n) SK_LAMBDA {
      const Pair<T> x = load_pair<T, checked>(a, b, j, n);
      Vec<T> d = x.d - at.centre;
      if constexpr (checked) d = x.absent ? Vec<T>{} : d;
      const Vec<T> w = exp_nonpositive<T>(x.b - at.max_b);
      put(exp_b + j, w, n);
      vb += w;
      vq += w * d;
      if constexpr (near) {
        const Vec<T> change = w * expm1_small<T>(d);
        vdrift += change;
        vp += change * d;
      } else {
        const Vec<T> v = exp_nonpositive<T>(x.a - at.max_a);
        put(exp_a + j, v, n);
        va += v;
        vp += v * d;
      }
    });
    row.sum_a += reduce_add<T>(va);
    row.sum_b += reduce_add<T>(vb);
    row.drift += reduce_add<T>(vdrift);
    row.p_d += reduce_add<T>(vp);
    row.q_d += reduce_add<T>(vq);
  }
}

// What follows from them
template <typename T>
void conclude(LongRow<T>& row) {
  const double inv_b = 1 / row.sum_b, q_d = row.q_d * inv_b;
  double s, p_d;
  if (row.near()) {
    const double drift = row.drift * inv_b, ratio = 1 / (1 + drift);
    s = std::log1p(drift);
    p_d = (row.p_d * inv_b + q_d) * ratio;
    row.ratio = T(ratio);
    row.offset = T(-drift * ratio);
  } else {
    const double inv_a = 1 / row.sum_a;
    s = std::log(row.sum_a / row.sum_b) + (double(row.at.max_a) - row.at.max_b - row.at.centre);
    p_d = row.p_d * inv_a;
    row.inv_a = T(inv_a);
  }
  row.inv_b = T(inv_b);
  row.s = T(s);
  row.kl_pq = T(p_d - s);
  row.kl_qp = T(s - q_d);
}

// Its loss, its gradients written
template <typename T, bool near>
void finish(LongRow<T>& of, int64_t cols) {
  const LongRow<T> row = of;
  const Wanted<T>& want = row.want;
  const T own = want.detach ? T(0) : want.scale;
  double loss = 0;
  for (int64_t begin = 0; begin < cols; begin += kSegment) {
    Vec<T> vloss{};
    for_columns<T>(begin, std::min(begin + kSegment, cols), row.masked, [&](auto checked, int64_t j, int n) SK_LAMBDA {
      const Pair<T> x = load_pair<T, checked>(row.a, row.b, j, n);
      Vec<T> d = x.d - row.at.centre;
      if constexpr (checked) d = x.absent ? Vec<T>{} : d;
      const Vec<T> t = d - row.s;
      const Vec<T> q = load_n(want.grad_b + j, n, T(0)) * row.inv_b;
      Vec<T> p, difference;
      if constexpr (near) {
        difference = q * (expm1_small<T>(d) * row.ratio + row.offset);  // q expm1(d - s)
        p = q + difference;
      } else {
        p = rounded(load_n(want.grad_a + j, n, T(0)) * row.inv_a);  // the same bits whichever gradients are wanted
        difference = vabs<T>(t) <= kNear<T> ? q * expm1_small<T>(t) : p - q;
      }
      vloss += difference * t;
      const Vec<T> scaled = difference * want.scale;
      if (want.input_grad) put(want.grad_a + j, p * own * (t - row.kl_pq) + scaled, n);
      if (want.target_grad) put(want.grad_b + j, q * -own * (t + row.kl_qp) - scaled, n);
    });
    loss += reduce_add<T>(vloss);
  }
  of.loss = T(loss);
}

// Some rows: a stage of all before the next of any, so that none waits for the last sums of the one before it.
template <typename T>
void long_rows(LongRow<T>* rows, int count, int64_t cols) {
  const auto each = [&](auto&& stage) SK_LAMBDA {
    for (int i = 0; i < count; ++i)
      if (rows[i].counts) stage(rows[i]);
  };
  each([&](LongRow<T>& row) SK_LAMBDA { look(row, cols); });
  each([&](LongRow<T>& row) SK_LAMBDA { row.near() ? gather<T, true>(row, cols) : gather<T, false>(row, cols); });
  each([&](LongRow<T>& row) SK_LAMBDA { conclude(row); });
  each([&](LongRow<T>& row) SK_LAMBDA { row.near() ? finish<T, true>(row, cols) : finish<T, false>(row, cols); });
}

// Of kLanes rows at once, turned: vector j holds class j of each. What one look at them tells.
template <typename T>
struct ShortSurvey {
  Vec<T> max_a, max_b, centre, spread;
  Mask<T> undefined, infinite;
};

template <typename T>
SK_INLINE ShortSurvey<T> survey_short(const Vec<T>* a, const Vec<T>* b, Vec<T>* d, int cols) {
  Vec<T> max_a = set1(-kInf<T>), max_b = max_a, centre{}, low = set1(kInf<T>), high = max_a, odd{};
  for (int j = 0; j < cols; ++j) {
    d[j] = a[j] - b[j];
    centre = b[j] > max_b ? d[j] : centre;
    max_a = vmax(a[j], max_a);
    max_b = vmax(b[j], max_b);
    low = vmin(d[j], low);
    high = vmax(d[j], high);
    odd += d[j] * T(0);
  }
  Mask<T> undefined{}, infinite{};
  if (any<T>(odd != odd)) {  // a difference is not finite
    for (int j = 0; j < cols; ++j) {
      undefined |= ~(a[j] < kInf<T>) | ~(b[j] < kInf<T>);
      infinite |= (a[j] == -kInf<T>) ^ (b[j] == -kInf<T>);
    }
    undefined |= (max_a == -kInf<T>) | (max_b == -kInf<T>);
    low = set1(kInf<T>);
    high = -low;
    for (int j = 0; j < cols; ++j) {
      const Mask<T> absent = (a[j] == -kInf<T>) & (b[j] == -kInf<T>);
      d[j] = absent ? centre : d[j];
      low = vmin(d[j], low);
      high = vmax(d[j], high);
    }
  }
  return {max_a, max_b, centre, vmax(high - centre, centre - low), undefined, infinite};
}

// What their gradients follow from, all rows done in one of the two ways. What is cheap to make is made anew from what
// is kept: to store a vector takes as long as four operations.
template <typename T, bool near>
struct ShortRows {
  const Vec<T>*a, *b, *d;  // near: expm1(d - centre), far: p; exp(b - max_b); a - b
  const Vec<T>* difference;  // far: p - q
  Vec<T> centre, inv_b{}, s{}, ratio{}, offset{};
  Vec<T> loss{}, kl_pq{}, kl_qp{};

  struct Class {
    Vec<T> p, q, difference, t;
  };
  SK_INLINE Class operator[](int j) const {
    const Vec<T> q = b[j] * inv_b, t = (d[j] - centre) - s;
    if constexpr (near) {
      const Vec<T> x = q * (a[j] * ratio + offset);  // q expm1(d - centre - s)
      return {q + x, q, x, t};
    } else {
      return {a[j], q, difference[j], t};
    }
  }
  SK_INLINE Vec<T> grad_a(int j, Vec<T> scale, T own) const {
    const Class x = (*this)[j];
    return (x.p * (x.t - kl_pq) * own + x.difference) * scale;
  }
  SK_INLINE Vec<T> grad_b(int j, Vec<T> scale, T own) const {
    const Class x = (*this)[j];
    return (x.q * (x.t + kl_qp) * own + x.difference) * -scale;
  }
};

// The rows' sums; what is kept takes the place of a and b.
template <typename T, bool near>
__attribute__((noinline)) ShortRows<T, near> sum_short(
    Vec<T>* a, Vec<T>* b, const Vec<T>* d, Vec<T>* difference, const ShortSurvey<T>& at, int cols) {
  ShortRows<T, near> rows{a, b, d, difference, at.centre};
  Vec<T> sum_a{}, sum_b{}, drift{};
  for (int j = 0; j < cols; ++j) {
    b[j] = exp_nonpositive<T>(b[j] - at.max_b);
    sum_b += b[j];
    if constexpr (near) {
      a[j] = expm1_small<T>(d[j] - at.centre);
      drift += b[j] * a[j];
    } else {
      a[j] = exp_nonpositive<T>(a[j] - at.max_a);
      sum_a += a[j];
    }
  }
  rows.inv_b = T(1) / sum_b;
  const auto add = [&](Vec<T> p, Vec<T> q, Vec<T> difference, Vec<T> t) SK_LAMBDA {
    rows.loss += difference * t;
    rows.kl_pq += p * t;
    rows.kl_qp -= q * t;
  };
  if constexpr (near) {
    rows.s = log1p<T>(drift / sum_b);
    rows.offset = expm1_small<T>(-rows.s);
    rows.ratio = rows.offset + T(1);
    for (int j = 0; j < cols; ++j) {
      const auto x = rows[j];
      add(x.p, x.q, x.difference, x.t);
    }
  } else {
    rows.s = log_positive<T>(sum_a / sum_b) + (at.max_a - at.max_b - at.centre);
    const Vec<T> inv_a = T(1) / sum_a;
    for (int j = 0; j < cols; ++j) {
      const Vec<T> q = b[j] * rows.inv_b, t = (d[j] - at.centre) - rows.s;
      const Mask<T> close = vabs<T>(t) <= kNear<T>;
      const Vec<T> x = close ? q * expm1_small<T>(t) : a[j] * inv_a - q, p = close ? q + x : a[j] * inv_a;
      add(p, q, x, t);
      difference[j] = x;
      a[j] = p;
    }
  }
  return rows;
}

// Rows of both kinds are done both ways, so that the bits of a row never depend on the rows beside it.
template <typename T>
struct MixedRows {
  ShortRows<T, true> near;
  ShortRows<T, false> far;
  Mask<T> is_near;
  Vec<T> loss;

  SK_INLINE Vec<T> grad_a(int j, Vec<T> scale, T own) const {
    return is_near ? near.grad_a(j, scale, own) : far.grad_a(j, scale, own);
  }
  SK_INLINE Vec<T> grad_b(int j, Vec<T> scale, T own) const {
    return is_near ? near.grad_b(j, scale, own) : far.grad_b(j, scale, own);
  }
};

// Calls f with what the gradients of the rows follow from.
template <typename T, typename F>
SK_INLINE void short_rows(Vec<T>* a, Vec<T>* b, const Vec<T>* d, const ShortSurvey<T>& at, int cols, F&& f) {
  Vec<T> difference[kMaxTransposed];
  const Mask<T> near = at.spread <= kNear<T>;
  if (!any<T>(~near)) return f(sum_short<T, true>(a, b, d, difference, at, cols));
  if (!any<T>(near)) return f(sum_short<T, false>(a, b, d, difference, at, cols));
  Vec<T> a_near[kMaxTransposed], b_near[kMaxTransposed];
  std::copy_n(a, cols, a_near), std::copy_n(b, cols, b_near);
  MixedRows<T> rows{
      sum_short<T, true>(a_near, b_near, d, nullptr, at, cols), sum_short<T, false>(a, b, d, difference, at, cols), near};
  rows.loss = near ? rows.near.loss : rows.far.loss;
  f(rows);
}

// Some rows in memory, side by side, to vectors of one class each, and back.
template <typename T>
void turn_in(const T* rows, int count, int cols, Vec<T>* out) {
  constexpr int N = kLanes<T>;
  int j = 0;
  if (count == N)
    for (; j + N <= cols; j += N) {
      for (int i = 0; i < N; ++i) out[j + i] = load(rows + i * cols + j);
      transpose<T>(out + j);
    }
  T* const lanes = reinterpret_cast<T*>(out);
  for (int i = 0; i < count; ++i)
    for (int k = j; k < cols; ++k) lanes[k * N + i] = rows[i * cols + k];
}
template <typename T, typename F>
SK_INLINE void turn_out(F&& column, int count, int cols, T* rows) {
  constexpr int N = kLanes<T>;
  int j = 0;
  if (count == N)
    for (; j + N <= cols; j += N) {
      Vec<T> tile[N];
#pragma GCC unroll 32
      for (int i = 0; i < N; ++i) tile[i] = column(j + i);
      transpose<T>(tile);
#pragma GCC unroll 32
      for (int i = 0; i < N; ++i) store(rows + i * cols + j, tile[i]);
    }
  for (; j < cols; ++j) {
    const Vec<T> x = column(j);
    if (count == N)
#pragma GCC unroll 32
      for (int i = 0; i < N; ++i) rows[i * cols + j] = x[i];
    else
      for (int i = 0; i < count; ++i) rows[i * cols + j] = x[i];
  }
}

// `cols` values of any dtype and stride in contiguous T, and back.
template <typename T, typename S>
void widen(const S* x, int64_t stride, int64_t cols, T* out) {
  constexpr int N = kLanes<T>;
  int64_t j = 0;
  if (stride == 1) {
    for (; j + N <= cols; j += N) store(out + j, load(x + j));
    if (j < cols) store_n(out + j, load_some(x + j, int(cols - j)), int(cols - j));
  } else {
    for (; j < cols; ++j) out[j] = load_some(x + j * stride, 1)[0];
  }
}
template <typename T, typename S>
void narrow(const T* x, int64_t cols, S* out) {
  constexpr int N = kLanes<T>;
  int64_t j = 0;
  for (; j + N <= cols; j += N) store(out + j, load(x + j));
  if (j < cols) store_some(out + j, load_some(x + j, int(cols - j)), int(cols - j));
}

template <typename T>
constexpr ScalarType kDtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// `count` rows in contiguous T: where they lie if they are that already, else in scratch.
template <typename T>
const T* rows_in(const Rows& x, int64_t first, int64_t count, T* scratch) {
  const bool together = count == 1 || x.contiguous();
  if (x.dtype() == kDtype<T> && x.column_stride() == 1 && together) return static_cast<const T*>(x.row(first));
  const int64_t steps = together ? 1 : count, length = together ? count * x.cols() : x.cols();
  for (int64_t i = 0; i < steps; ++i) {
    const void* from = x.row(first + i);
    T* to = scratch + i * length;
    if (x.dtype() == kDtype<T>) widen(static_cast<const T*>(from), x.column_stride(), length, to);
    else if constexpr (std::is_same_v<T, float>) {
      if (x.dtype() == ScalarType::Half) widen(static_cast<const fp16*>(from), x.column_stride(), length, to);
      else widen(static_cast<const bf16*>(from), x.column_stride(), length, to);
    }
  }
  return scratch;
}

// Where gradients are computed: in place if they are wanted in T, else in scratch, from where they are rounded once.
template <typename T>
struct Gradient {
  char* data;  // of the whole contiguous gradient, null if it is not wanted
  ScalarType dtype;

  bool direct() const { return data && dtype == kDtype<T>; }
  T* at(int64_t offset, T* scratch) const { return direct() ? reinterpret_cast<T*>(data) + offset : scratch; }
  void round(const T* computed, int64_t offset, int64_t count) const {
    if (!data || direct()) return;
    if constexpr (std::is_same_v<T, float>) {
      if (dtype == ScalarType::Half) narrow(computed, count, reinterpret_cast<fp16*>(data) + offset);
      else narrow(computed, count, reinterpret_cast<bf16*>(data) + offset);
    }
  }
};

template <typename T>
void run_rows(const SymmetricKLJob& job, int64_t begin, int64_t end) {
  constexpr int N = kLanes<T>;
  const int64_t cols = job.a.cols();
  const T* const weight = static_cast<const T*>(job.weight);
  const T* const upstream = static_cast<const T*>(job.upstream);
  T* const losses = static_cast<T*>(job.losses);
  const Gradient<T> grad_a{static_cast<char*>(job.grad_a), job.a.dtype()};
  const Gradient<T> grad_b{static_cast<char*>(job.grad_b), job.b.dtype()};
  const T* const row_upstream = job.upstream_rows ? upstream : nullptr;
  const T common = T(job.scale * (upstream && !row_upstream ? upstream[0] : T(1)));

  if (cols <= kMaxTransposed) {
    Vec<T> a[kMaxTransposed], b[kMaxTransposed], d[kMaxTransposed];
    const T own = job.detach_targets ? T(0) : T(1);
    T scratch[kMaxTransposed * N];
    std::memset(a, 0, cols * sizeof *a);  // lanes that never hold a row hold numbers
    std::memset(b, 0, cols * sizeof *b);
    for (int64_t first = begin; first < end; first += N) {
      const int count = int(std::min<int64_t>(N, end - first));
      turn_in(rows_in(job.a, first, count, scratch), count, int(cols), a);
      turn_in(rows_in(job.b, first, count, scratch), count, int(cols), b);
      Vec<T> scale = set1(common);
      if (row_upstream) scale *= load_n(row_upstream + first, count, T(0));
      if (weight) {
        const Vec<T> factor = load_n(weight + first, count, T(1));
        scale *= factor;
        for (int64_t j = 0; j < cols; ++j) {  // without weight: as if the logits were equal
          a[j] = factor == Vec<T>{} ? Vec<T>{} : a[j];
          b[j] = factor == Vec<T>{} ? Vec<T>{} : b[j];
        }
      }
      const ShortSurvey<T> at = survey_short<T>(a, b, d, int(cols));
      scale = at.undefined | at.infinite ? set1(kNan<T>) : scale;
      short_rows<T>(a, b, d, at, int(cols), [&](const auto& of) SK_LAMBDA {
        if (losses)
          store_n(losses + first, at.undefined ? set1(kNan<T>) : at.infinite ? set1(kInf<T>) : of.loss, count);
        const auto write = [&](const Gradient<T>& grad, auto&& column) SK_LAMBDA {
          if (!grad.data) return;
          T* const rows = grad.at(first * cols, scratch);
          turn_out<T>(column, count, int(cols), rows);
          grad.round(rows, first * cols, count * cols);
        };
        write(grad_a, [&](int j) SK_LAMBDA { return of.grad_a(j, scale, own); });
        write(grad_b, [&](int j) SK_LAMBDA { return of.grad_b(j, scale, own); });
      });
    }
    return;
  }

  const int together = int(std::clamp<int64_t>(kTogether / cols, 1, kMaxTogether));
  const int64_t room = together * cols;
  const std::unique_ptr<T[]> scratch(new T[4 * room]);
  LongRow<T> rows[kMaxTogether];
  for (int64_t first = begin; first < end; first += together) {
    const int count = int(std::min<int64_t>(together, end - first));
    T* const to_a = grad_a.at(first * cols, scratch.get() + 2 * room);
    T* const to_b = grad_b.at(first * cols, scratch.get() + 3 * room);
    for (int i = 0; i < count; ++i) {
      const T factor = weight ? weight[first + i] : T(1);
      const T scale = common * (row_upstream ? row_upstream[first + i] : T(1)) * factor;
      LongRow<T>& row = rows[i];
      row.a = rows_in(job.a, first + i, 1, scratch.get() + i * cols);  // each where it lies, if it can
      row.b = rows_in(job.b, first + i, 1, scratch.get() + room + i * cols);
      const bool detach = job.detach_targets, of_a = job.grad_a, of_b = job.grad_b;
      row.want = {scale, detach, of_a, of_b, to_a + i * cols, to_b + i * cols};
      row.counts = factor != T(0);
      if (!row.counts) row.settle(T(0), T(0), cols);
    }
    long_rows(rows, count, cols);
    grad_a.round(to_a, first * cols, count * cols);
    grad_b.round(to_b, first * cols, count * cols);
    if (losses)
      for (int i = 0; i < count; ++i) losses[first + i] = rows[i].loss;
  }
}

void symmetric_kl_rows(const SymmetricKLJob& job, int64_t begin, int64_t end) {
  if (job.a.dtype() == ScalarType::Double) run_rows<double>(job, begin, end);
  else run_rows<float>(job, begin, end);
}

}  // namespace smart_kernels::SK_ISA
