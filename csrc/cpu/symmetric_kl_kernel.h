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
constexpr int64_t kMaxTransposed = 64;

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
  Survey<T> y{max_a[0], max_b[0], centre[0], 0, !any<T>(odd)};
  T lowest = low[0], highest = high[0];
  for (int i = 1; i < kLanes<T>; ++i) {
    if (max_b[i] > y.max_b) y.max_b = max_b[i], y.centre = centre[i];
    y.max_a = std::max(y.max_a, max_a[i]);
    lowest = std::min(lowest, low[i]);
    highest = std::max(highest, high[i]);
  }
  y.spread = std::max(highest - y.centre, y.centre - lowest);
  return y;
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

// Everything about a row that its gradients need beside the logits.
template <typename T>
struct RowState {
  T max_a, inv_a;  // p = exp(a - max_a) inv_a
  T max_b, inv_b;  // q = exp(b - max_b) inv_b
  T centre, s;     // t = (a - b - centre) - s
  T kl_pq, kl_qp;
};

// The sums over a row, from which its state follows.
template <typename T, bool near>
RowState<T> gather(const T* a, const T* b, int64_t cols, bool masked, const Survey<T>& at) {
  double sum_a = 0, sum_b = 0, drift = 0, p_d = 0, q_d = 0;
  for (int64_t begin = 0; begin < cols; begin += kSegment) {
    Vec<T> va{}, vb{}, vdrift{}, vp{}, vq{};
    for_columns<T>(begin, std::min(begin + kSegment, cols), masked, [&](auto checked, int64_t j, int n) SK_LAMBDA {
      const Pair<T> x = load_pair<T, checked>(a, b, j, n);
      Vec<T> d = x.d - at.centre;
      if constexpr (checked) d = x.absent ? Vec<T>{} : d;
      const Vec<T> w = exp_nonpositive<T>(x.b - at.max_b);
      vb += w;
      vq += w * d;
      if constexpr (near) {
        const Vec<T> change = w * expm1_small<T>(d);
        vdrift += change;
        vp += change * d;
      } else {
        const Vec<T> v = exp_nonpositive<T>(x.a - at.max_a);
        va += v;
        vp += v * d;
      }
    });
    sum_a += reduce_add<T>(va);
    sum_b += reduce_add<T>(vb);
    drift += reduce_add<T>(vdrift);
    p_d += reduce_add<T>(vp);
    q_d += reduce_add<T>(vq);
  }
  double s;
  if constexpr (near) {
    s = std::log1p(drift / sum_b);
    p_d = std::exp(-s) * (p_d + q_d) / sum_b;
    sum_a = 1;
  } else {
    s = std::log(sum_a / sum_b) + (double(at.max_a) - at.max_b - at.centre);
    p_d /= sum_a;
  }
  q_d /= sum_b;
  return {at.max_a, T(1 / sum_a), at.max_b, T(1 / sum_b), at.centre, T(s), T(p_d - s), T(s - q_d)};
}

// How a row is asked for: the factor on its gradients, and where they go (null: not wanted).
template <typename T>
struct Wanted {
  T scale;
  bool detach;
  T *grad_a, *grad_b;
};

// The loss of a row, its gradients written.
template <typename T, bool near>
T finish(const T* a, const T* b, int64_t cols, bool masked, const RowState<T>& row, const Wanted<T>& want) {
  const T ratio = T(std::exp(-double(row.s))), offset = T(std::expm1(-double(row.s)));
  const T own = want.detach ? T(0) : T(1);
  double loss = 0;
  for (int64_t begin = 0; begin < cols; begin += kSegment) {
    Vec<T> vloss{};
    for_columns<T>(begin, std::min(begin + kSegment, cols), masked, [&](auto checked, int64_t j, int n) SK_LAMBDA {
      const Pair<T> x = load_pair<T, checked>(a, b, j, n);
      Vec<T> d = x.d - row.centre;
      if constexpr (checked) d = x.absent ? Vec<T>{} : d;
      const Vec<T> t = d - row.s;
      const Vec<T> q = exp_nonpositive<T>(x.b - row.max_b) * row.inv_b;
      Vec<T> p, difference;
      if constexpr (near) {
        difference = q * (expm1_small<T>(d) * ratio + offset);  // expm1(d - s)
        p = q + difference;
      } else {
        p = exp_nonpositive<T>(x.a - row.max_a) * row.inv_a;
        difference = vabs<T>(t) <= kNear<T> ? q * expm1_small<T>(t) : p - q;
      }
      vloss += difference * t;
      if (want.grad_a) {
        const Vec<T> grad = (p * (t - row.kl_pq) * own + difference) * want.scale;
        n == kLanes<T> ? store(want.grad_a + j, grad) : store_n(want.grad_a + j, grad, n);
      }
      if (want.grad_b) {
        const Vec<T> grad = (q * (t + row.kl_qp) * own + difference) * -want.scale;
        n == kLanes<T> ? store(want.grad_b + j, grad) : store_n(want.grad_b + j, grad, n);
      }
    });
    loss += reduce_add<T>(vloss);
  }
  return T(loss);
}

// One row of any length: its loss, its gradients written.
template <typename T>
T long_row(const T* a, const T* b, int64_t cols, const Wanted<T>& want) {
  bool masked = false;
  Survey<T> at = survey(a, b, cols, masked);
  if (!at.finite) {
    const Kind kind = classify(a, b, cols);
    if (kind == Kind::infinite || kind == Kind::undefined) {
      if (want.grad_a) std::fill_n(want.grad_a, cols, kNan<T>);
      if (want.grad_b) std::fill_n(want.grad_b, cols, kNan<T>);
      return kind == Kind::infinite ? kInf<T> : kNan<T>;
    }
    masked = kind == Kind::masked;
    at = survey(a, b, cols, masked);
  }
  if (at.spread <= kNear<T>)
    return finish<T, true>(a, b, cols, masked, gather<T, true>(a, b, cols, masked, at), want);
  return finish<T, false>(a, b, cols, masked, gather<T, false>(a, b, cols, masked, at), want);
}

// kLanes rows at once, turned: vector j holds class j of each. The gradients take the place of a and b.
template <typename T>
Vec<T> short_rows(Vec<T>* a, Vec<T>* b, int cols, Vec<T> scale, bool detach) {
  Vec<T> max_a = set1(-kInf<T>), max_b = max_a, centre{};
  Mask<T> undefined{}, infinite{};
  for (int j = 0; j < cols; ++j) {
    const Mask<T> gone_a = a[j] == -kInf<T>, gone_b = b[j] == -kInf<T>, larger = b[j] > max_b;
    undefined |= ~(a[j] < kInf<T>) | ~(b[j] < kInf<T>);
    infinite |= gone_a ^ gone_b;
    max_a = vmax(a[j], max_a);
    max_b = larger ? b[j] : max_b;
    centre = larger ? a[j] - b[j] : centre;
  }
  undefined |= (max_a == -kInf<T>) | (max_b == -kInf<T>);

  Vec<T> sum_a{}, sum_b{}, drift{}, spread{};
  Vec<T> d[kMaxTransposed];
  for (int j = 0; j < cols; ++j) {
    const Mask<T> absent = (a[j] == -kInf<T>) & (b[j] == -kInf<T>);
    d[j] = absent ? Vec<T>{} : a[j] - b[j] - centre;
    spread = vmax(vabs<T>(d[j]), spread);
    a[j] = exp_nonpositive<T>(a[j] - max_a);
    b[j] = exp_nonpositive<T>(b[j] - max_b);
    sum_a += a[j];
    sum_b += b[j];
    drift += b[j] * expm1_small<T>(d[j]);
  }
  const Vec<T> s = spread <= kNear<T> ? log1p<T>(drift / sum_b)
                                      : log_positive<T>(sum_a / sum_b) + (max_a - max_b - centre);
  const Vec<T> inv_a = T(1) / sum_a, inv_b = T(1) / sum_b;

  Vec<T> loss{}, kl_pq{}, kl_qp{};
  for (int j = 0; j < cols; ++j) {
    const Vec<T> q = b[j] * inv_b, t = d[j] - s;
    Vec<T> p = a[j] * inv_a;
    const Mask<T> close = vabs<T>(t) <= kNear<T>;
    const Vec<T> difference = close ? q * expm1_small<T>(t) : p - q;
    p = close ? q + difference : p;
    loss += difference * t;
    kl_pq += p * t;
    kl_qp -= q * t;
    a[j] = p;
    b[j] = q;
    d[j] = t;
  }
  loss = undefined ? set1(kNan<T>) : infinite ? set1(kInf<T>) : loss;
  scale = undefined | infinite ? set1(kNan<T>) : scale;
  const T own = detach ? T(0) : T(1);
  for (int j = 0; j < cols; ++j) {
    const Vec<T> p = a[j], q = b[j], t = d[j];
    const Vec<T> difference = vabs<T>(t) <= kNear<T> ? q * expm1_small<T>(t) : p - q;
    a[j] = (p * (t - kl_pq) * own + difference) * scale;
    b[j] = (q * (t + kl_qp) * own + difference) * -scale;
  }
  return loss;
}

// A row of any dtype and stride, in contiguous T.
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
const T* contiguous_row(const Rows& x, int64_t row, T* scratch) {
  const void* p = x.row(row);
  const auto any = [&](auto tag) { widen(static_cast<const decltype(tag)*>(p), x.column_stride(), x.cols(), scratch); };
  if constexpr (std::is_same_v<T, double>) {
    if (x.column_stride() == 1) return static_cast<const T*>(p);
    any(double{});
  } else {
    if (x.dtype() == ScalarType::Float && x.column_stride() == 1) return static_cast<const T*>(p);
    x.dtype() == ScalarType::Float ? any(float{}) : x.dtype() == ScalarType::Half ? any(fp16{}) : any(bf16{});
  }
  return scratch;
}

// Where a gradient row is computed: in place if it is held in T, else in scratch, from where it is rounded once.
template <typename T>
struct GradRow {
  GradRow(void* data, ScalarType dtype, int64_t row, int64_t cols, T* scratch)
      : data_(static_cast<char*>(data)), dtype_(dtype), first_(row * cols), cols_(cols) {
    if (!data) at = nullptr;
    else if (direct()) at = reinterpret_cast<T*>(data) + first_;
    else at = scratch;
  }
  void write(int64_t count) const {
    if (!at || direct()) return;
    if constexpr (std::is_same_v<T, float>) {
      if (dtype_ == ScalarType::Half) narrow(at, count, reinterpret_cast<fp16*>(data_) + first_);
      else narrow(at, count, reinterpret_cast<bf16*>(data_) + first_);
    }
  }
  bool direct() const { return dtype_ == ScalarType::Float || dtype_ == ScalarType::Double; }
  T* at;

 private:
  char* data_;
  ScalarType dtype_;
  int64_t first_, cols_;
};

template <typename T>
void run_rows(const SymmetricKLJob& job, int64_t begin, int64_t end) {
  const int64_t cols = job.a.cols();
  constexpr int N = kLanes<T>;
  const auto factor = [&](int64_t row) {
    double f = job.scale;
    if (job.weight) f *= static_cast<const T*>(job.weight)[row];
    if (job.upstream) f *= static_cast<const T*>(job.upstream)[job.upstream_rows ? row : 0];
    return T(f);
  };
  const auto counts = [&](int64_t row) { return !job.weight || static_cast<const T*>(job.weight)[row] != T(0); };
  T* const losses = static_cast<T*>(job.losses);

  if (cols <= kMaxTransposed) {
    Vec<T> a[kMaxTransposed], b[kMaxTransposed];
    T row_buffer[kMaxTransposed];
    for (int64_t first = begin; first < end; first += N) {
      const int count = int(std::min<int64_t>(N, end - first));
      Vec<T> scale{};
      for (int64_t j = 0; j < cols; ++j) a[j] = b[j] = Vec<T>{};
      for (int i = 0; i < count; ++i) {
        if (!counts(first + i)) continue;  // stays at equal logits: loss and gradients 0
        scale[i] = factor(first + i);
        const T* row = contiguous_row(job.a, first + i, row_buffer);
        for (int64_t j = 0; j < cols; ++j) a[j][i] = row[j];
        row = contiguous_row(job.b, first + i, row_buffer);
        for (int64_t j = 0; j < cols; ++j) b[j][i] = row[j];
      }
      const Vec<T> loss = short_rows<T>(a, b, int(cols), scale, job.detach_targets);
      if (losses) store_n(losses + first, loss, count);
      for (int i = 0; i < count; ++i) {
        const GradRow<T> grad_a(job.grad_a, job.a.dtype(), first + i, cols, row_buffer);
        if (grad_a.at)
          for (int64_t j = 0; j < cols; ++j) grad_a.at[j] = a[j][i];
        grad_a.write(cols);
        const GradRow<T> grad_b(job.grad_b, job.b.dtype(), first + i, cols, row_buffer);
        if (grad_b.at)
          for (int64_t j = 0; j < cols; ++j) grad_b.at[j] = b[j][i];
        grad_b.write(cols);
      }
    }
    return;
  }

  const std::unique_ptr<T[]> scratch(new T[4 * cols]);
  for (int64_t i = begin; i < end; ++i) {
    const GradRow<T> grad_a(job.grad_a, job.a.dtype(), i, cols, scratch.get() + 2 * cols);
    const GradRow<T> grad_b(job.grad_b, job.b.dtype(), i, cols, scratch.get() + 3 * cols);
    T loss = 0;
    if (counts(i)) {
      const T* a = contiguous_row(job.a, i, scratch.get());
      const T* b = contiguous_row(job.b, i, scratch.get() + cols);
      loss = long_row<T>(a, b, cols, {factor(i), job.detach_targets, grad_a.at, grad_b.at});
    } else {
      if (grad_a.at) std::fill_n(grad_a.at, cols, T(0));
      if (grad_b.at) std::fill_n(grad_b.at, cols, T(0));
    }
    grad_a.write(cols);
    grad_b.write(cols);
    if (losses) losses[i] = loss;
  }
}

void symmetric_kl_rows(const SymmetricKLJob& job, int64_t begin, int64_t end) {
  if (job.a.dtype() == ScalarType::Double) run_rows<double>(job, begin, end);
  else run_rows<float>(job, begin, end);
}

}  // namespace smart_kernels::SK_ISA
