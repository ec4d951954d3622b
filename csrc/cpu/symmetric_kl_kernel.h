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
// Long rows are read twice, block by block: once for the sums, where each block is looked at before (it lies in the
// first cache by then), once for the gradients. Rows of up to kMaxTransposed classes are turned so that each lane holds
// a row of its own.

namespace smart_kernels::SK_ISA {

template <typename T>
constexpr T kNear = T(0.5);
// Divergences from where on the rounding of p and q does not show in a gradient, so that p - q is their difference
template <typename T>
constexpr T kApart = T(0.25);
template <typename T>
constexpr T kInf = std::numeric_limits<T>::infinity();
template <typename T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
// Of a row at a time. Four such blocks lie in any first cache; sums run in vectors of T over one and then in double, so
// that a long row costs no digits.
template <typename T>
constexpr int64_t kBlock = 4096 / sizeof(T);
// Of a class four vectors are kept; those of all classes fit in any first cache, and leave room there.
constexpr int64_t kMaxTransposed = std::min(256, 24576 / (4 * SK_VECTOR_BYTES));
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

// What one look at a block tells: the largest logits, and how far d goes. NaN is not seen; the sums will have it.
template <typename T>
struct Survey {
  T max_a, max_b, low, high;
};

template <typename T>
Survey<T> survey(const T* a, const T* b, int64_t cols, bool masked) {
  Vec<T> max_a = set1(-kInf<T>), max_b = max_a, low = set1(kInf<T>), high = max_a;
  for_columns<T>(0, cols, masked, [&](auto checked, int64_t j, int n) SK_LAMBDA {
    const Pair<T> x = load_pair<T, checked>(a, b, j, n);
    max_a = vmax(x.a, max_a);
    max_b = vmax(x.b, max_b);
    low = vmin(checked ? (x.absent ? low : x.d) : x.d, low);
    high = vmax(checked ? (x.absent ? high : x.d) : x.d, high);
  });
  return {reduce_max<T>(max_a), reduce_max<T>(max_b), reduce_min<T>(low), reduce_max<T>(high)};
}

// Sums over classes of w = exp(b - max b), of v = exp(a - max a) = w exp(d) with d = a - b - (max a - max b), and of
// their products with d; near: of x = w expm1(d) in place of v.
struct Sums {
  double w = 0, wd = 0, x = 0, xd = 0;
};

// How a block was done: against which maxima its exponentials are that wait for `finish`.
template <typename T>
struct Block {
  T max_a, max_b;
  bool near, done;
};

// A row of any length on its way, and what each stage finds out.
template <typename T>
struct LongRow {
  const void *a, *b;   // where it lies
  T scale;             // of its gradients
  T *wait_a, *wait_b;  // where its exponentials wait, if they may
  Block<T>* blocks;
  bool counts;         // still: there is something to find out
  bool careful = false;  // classes may be absent, sums of some classes may overflow
  T loss = 0;

  bool near = true;
  T max_a = -kInf<T>, max_b = -kInf<T>, low = kInf<T>, high = -kInf<T>;
  Sums sums{};

  T inv_a = 0, inv_b = 0;          // p = v inv_a, q = w inv_b
  T s = 0, ratio = 0, offset = 0;  // t = d - s; near: exp(-s), expm1(-s)
  T kl_pq = 0, kl_qp = 0;

  T centre() const { return max_a - max_b; }
};

// The row's maxima, and with them the centre of d, move on to those of its next block; the sums follow.
template <typename T>
void advance(LongRow<T>& row, const Survey<T>& at, Block<T>& block) {
  const T max_a = std::max(row.max_a, at.max_a), max_b = std::max(row.max_b, at.max_b), centre = max_a - max_b;
  row.low = std::min(row.low, at.low);
  row.high = std::max(row.high, at.high);
  Sums& of = row.sums;
  if ((max_a != row.max_a || max_b != row.max_b) && of.w > 0) {
    const double shift = double(centre) - row.centre(), w = std::exp(double(row.max_b) - max_b);
    const double wd = of.wd - shift * of.w, xd = of.xd - shift * of.x;
    if (row.near) {  // w (exp(d - shift) - 1) = exp(-shift) x + expm1(-shift) w
      const double less = std::expm1(-shift);
      of.x = w * ((1 + less) * of.x + less * of.w);
      of.xd = w * ((1 + less) * xd + less * wd);
    } else {
      const double v = std::exp(double(row.max_a) - max_a);
      of.x *= v;
      of.xd = v * xd;
    }
    of.w *= w;
    of.wd = w * wd;
  }
  row.max_a = max_a;
  row.max_b = max_b;
  block = {max_a, max_b, std::max(at.high - centre, centre - at.low) <= kNear<T>, true};
  if (row.near && !block.near) {
    row.near = false;
    of.x += of.w;
    of.xd += of.wd;
  }
}

// The sums over some classes of a block. What waits is w, and v or expm1(d). The next block, `ahead`, is asked for
// meanwhile: to look at it takes no longer than to fetch it.
template <typename T, bool near, bool wait>
void gather(LongRow<T>& row, const T* a, const T* b, int64_t cols, int64_t ahead, T* wait_a, T* wait_b) {
  const T max_a = row.max_a, max_b = row.max_b, centre = row.centre();
  Vec<T> vw{}, vwd{}, vx{}, vxd{};
  for_columns<T>(0, cols, row.careful, [&](auto checked, int64_t j, int n) SK_LAMBDA {
    __builtin_prefetch(a + j + ahead);
    __builtin_prefetch(b + j + ahead);
    const Pair<T> y = load_pair<T, checked>(a, b, j, n);
    Vec<T> d = y.d - centre;
    if constexpr (checked) d = y.absent ? Vec<T>{} : d;
    const Vec<T> w = exp_nonpositive<T>(y.b - max_b);
    Vec<T> x = near ? expm1_small<T>(d) : exp_nonpositive<T>(y.a - max_a);
    if constexpr (wait) put(wait_b + j, w, n), put(wait_a + j, x, n);
    if constexpr (near) x = w * x;
    vw += w;
    vwd += w * d;
    vx += x;
    vxd += x * d;
  });
  const double w = reduce_add<T>(vw), wd = reduce_add<T>(vwd), x = reduce_add<T>(vx), xd = reduce_add<T>(vxd);
  const bool add_w = near && !row.near;
  row.sums.w += w;
  row.sums.wd += wd;
  row.sums.x += add_w ? x + w : x;
  row.sums.xd += add_w ? xd + wd : xd;
}

// What follows from the sums
template <typename T>
void conclude(LongRow<T>& row) {
  const Sums& of = row.sums;
  const double inv_w = 1 / of.w, q_d = of.wd * inv_w;
  double s, p_d, inv_v;
  if (row.near) {
    const double drift = of.x * inv_w, ratio = 1 / (1 + drift);
    s = std::log1p(drift);
    p_d = (of.xd * inv_w + q_d) * ratio;
    inv_v = inv_w * ratio;
    row.ratio = T(ratio);
    row.offset = T(-drift * ratio);
  } else {
    inv_v = 1 / of.x;
    s = std::log(of.x * inv_w);
    p_d = of.xd * inv_v;
  }
  row.near = row.near && std::max(row.high - row.centre(), row.centre() - row.low) <= kNear<T>;
  row.inv_a = T(inv_v);
  row.inv_b = T(inv_w);
  row.s = T(s);
  row.kl_pq = T(p_d - s);
  row.kl_qp = T(s - q_d);
}

// How p - q is had: from q alone; from q where |t| is small; as it stands, where both divergences are so large that
// the rounding of p and q does not show in a gradient.
enum class Way { near, far, apart };

// Of the gradients a block is asked for: a factor on them, and where they go; null if one is not wanted.
template <typename T>
struct Wanted {
  bool detach;
  T *grad_a, *grad_b;
};

// What is read next from memory: asked for while this block is computed, so that memory is never idle. A step of 0 asks for
// what is here already.
struct Next {
  const char *a, *b;
  int64_t step_a, step_b;  // bytes to the next class

  SK_INLINE void prefetch(int64_t j) const {
    __builtin_prefetch(a + j * step_a, 0, 2);
    __builtin_prefetch(b + j * step_b, 0, 2);
  }
};

// The loss of a block's classes, their gradients written
template <typename T, Way way, bool waiting>
double finish(
    const LongRow<T>& row, const Block<T>& block, const T* a, const T* b, int64_t cols, const T* wait_a,
    const T* wait_b, const Wanted<T>& want, const Next next) {
  T inv_a = row.inv_a, inv_b = row.inv_b, ratio = row.ratio, offset = row.offset;
  if (waiting && (block.max_a != row.max_a || block.max_b != row.max_b)) {  // the maxima have moved on since
    inv_a = T(inv_a * std::exp(double(block.max_a) - row.max_a));
    inv_b = T(inv_b * std::exp(double(block.max_b) - row.max_b));
    const double shift = (double(row.max_a) - row.max_b) - T(block.max_a - block.max_b);
    offset = T(offset + ratio * std::expm1(-shift));
    ratio = T(ratio * std::exp(-shift));
  }
  const T max_a = row.max_a, max_b = row.max_b, centre = row.centre(), s = row.s;
  const T scale = row.scale, own = want.detach ? T(0) : scale, own_pq = own * row.kl_pq, own_qp = own * row.kl_qp;
  T *const grad_a = want.grad_a, *const grad_b = want.grad_b;
  Vec<T> loss{};
  for_columns<T>(0, cols, row.careful, [&](auto checked, int64_t j, int n) SK_LAMBDA {
    next.prefetch(j);
    const Pair<T> y = load_pair<T, checked>(a, b, j, n);
    Vec<T> d = y.d - centre;
    if constexpr (checked) d = y.absent ? Vec<T>{} : d;
    const Vec<T> t = d - s;
    Vec<T> p, q, difference;  // rounded: the same bits whichever gradients are wanted
    if constexpr (waiting) q = load_n(wait_b + j, n, T(0));
    else q = exp_nonpositive<T>(y.b - max_b);
    q = rounded(q * inv_b);
    if constexpr (way == Way::near) {
      Vec<T> e;
      if constexpr (waiting) e = load_n(wait_a + j, n, T(0));
      else e = expm1_small<T>(d);
      difference = q * (e * ratio + offset);  // q expm1(d - s)
      p = q + difference;
    } else {
      if constexpr (waiting) p = load_n(wait_a + j, n, T(0));
      else p = exp_nonpositive<T>(y.a - max_a);
      p = rounded(p * inv_a);
      difference = p - q;
      if constexpr (way == Way::far) difference = vabs<T>(t) <= kNear<T> ? q * expm1_small<T>(t) : difference;
    }
    loss += difference * t;
    const Vec<T> scaled = rounded(difference * scale);
    if (grad_a) put(grad_a + j, p * (t * own - own_pq) + scaled, n);
    if (grad_b) put(grad_b + j, q * (t * -own - own_qp) - scaled, n);
  });
  return reduce_add<T>(loss);
}

// kLanes rows at once, turned: vector j holds class j of each, with room for a tile that is not full.
template <typename T>
class ShortRows {
 public:
  Vec<T> a[kMaxTransposed + kLanes<T>], b[kMaxTransposed + kLanes<T>];  // logits, then p and q
  Vec<T> loss;
  Mask<T> undefined, infinite;

  void run(int cols) {
    Vec<T> max_a = set1(-kInf<T>), max_b = max_a, low = set1(kInf<T>), high = max_a, odd{};
    for (int j = 0; j < cols; ++j) {
      const Vec<T> d = a[j] - b[j];
      max_a = vmax(a[j], max_a);
      max_b = vmax(b[j], max_b);
      low = vmin(d, low);
      high = vmax(d, high);
      odd += d * T(0);
      t_[j] = d;
    }
    undefined = infinite = Mask<T>{};
    const Vec<T> centre = max_a - max_b;
    if (any<T>(odd != odd)) {  // a difference is not finite: an absent class counts nothing, any other spoils its row
      undefined = (max_a == -kInf<T>) | (max_b == -kInf<T>);
      low = high = centre;
      for (int j = 0; j < cols; ++j) {
        undefined |= ~(a[j] < kInf<T>) | ~(b[j] < kInf<T>);
        infinite |= (a[j] == -kInf<T>) ^ (b[j] == -kInf<T>);
        t_[j] = (a[j] == -kInf<T>) & (b[j] == -kInf<T>) ? centre : t_[j];
        low = vmin(t_[j], low);
        high = vmax(t_[j], high);
      }
    }
    const Mask<T> near = vmax(high - centre, centre - low) <= kNear<T>;
    if (!any<T>(~near)) sum<true, false>(max_a, max_b, near, cols);
    else if (!any<T>(near)) sum<false, true>(max_a, max_b, near, cols);
    else sum<true, true>(max_a, max_b, near, cols);
  }

  // f(j) of the gradient of either side, each times `scale`, and `own` times that where it is not p - q
  SK_INLINE auto grad_a(Vec<T> scale, Vec<T> own) const {
    return [=, this, constant = own * kl_pq_](int j)
               SK_LAMBDA { return a[j] * (t_[j] * own - constant) + rounded(x_[j] * scale); };
  }
  SK_INLINE auto grad_b(Vec<T> scale, Vec<T> own) const {
    return [=, this, constant = own * kl_qp_](int j)
               SK_LAMBDA { return b[j] * (t_[j] * -own - constant) - rounded(x_[j] * scale); };
  }

 private:
  // All rows near, all far, or both ways for both kinds: the bits of a row must not depend on the rows beside it.
  template <bool some_near, bool some_far>
  __attribute__((noinline)) void sum(Vec<T> max_a, Vec<T> max_b, Mask<T> near, int cols) {
    const Vec<T> centre = max_a - max_b;
    Vec<T> sum_a{}, sum_b{}, p_d{}, q_d{}, drift{};
    for (int j = 0; j < cols; ++j) {
      const Vec<T> w = exp_nonpositive<T>(b[j] - max_b), d = t_[j] - centre;
      sum_b += w;
      if constexpr (some_near) {
        const Vec<T> e = expm1_small<T>(d);
        drift += w * e;
        x_[j] = e;
      }
      if constexpr (some_far) {
        const Vec<T> v = exp_nonpositive<T>(a[j] - max_a);
        sum_a += v;
        p_d += v * d;
        q_d += w * d;
        a[j] = v;
      }
      b[j] = w;
      t_[j] = d;
    }
    const Vec<T> inv_a = T(1) / sum_a, inv_b = T(1) / sum_b, change = drift * inv_b, ratio = T(1) / (change + T(1));
    const Vec<T> offset = -change * ratio;  // near: exp(-s), expm1(-s)
    Vec<T> s{}, far_pq{}, far_qp{};
    if constexpr (some_near) s = log1p<T>(change);
    if constexpr (some_far) {
      s = near ? s : log_positive<T>(sum_a * inv_b);
      far_pq = p_d * inv_a - s;
      far_qp = s - q_d * inv_b;
    }
    const Mask<T> apart = vmin(far_pq, far_qp) >= kApart<T>;
    const bool all_apart = !any<T>(~apart);
    Vec<T> loss{}, kl_pq{}, kl_qp{};
    const auto finish = [&](auto close_ones) SK_LAMBDA {
      for (int j = 0; j < cols; ++j) {
        const Vec<T> t = t_[j] - s, q = rounded(b[j] * inv_b);
        Vec<T> x{}, p{};
        if constexpr (some_near) {
          x = q * (x_[j] * ratio + offset);  // q expm1(d - s)
          p = q + x;
          kl_pq += p * t;
          kl_qp -= q * t;
        }
        if constexpr (some_far) {
          const Vec<T> far_p = rounded(a[j] * inv_a);
          Vec<T> far_x = far_p - q;
          if constexpr (close_ones) far_x = (vabs<T>(t) <= kNear<T>) & ~apart ? q * expm1_small<T>(t) : far_x;
          x = near ? x : far_x;
          p = near ? p : far_p;
        }
        loss += x * t;
        t_[j] = t;
        x_[j] = x;
        a[j] = p;
        b[j] = q;
      }
    };
    if (some_far && all_apart) finish(std::false_type{});
    else finish(std::true_type{});
    if constexpr (some_far) {
      kl_pq = near ? kl_pq : far_pq;
      kl_qp = near ? kl_qp : far_qp;
    }
    this->loss = loss;
    kl_pq_ = kl_pq;
    kl_qp_ = kl_qp;
  }

  Vec<T> t_[kMaxTransposed], x_[kMaxTransposed];  // a - b, d, t = log(p / q) by turns; p - q
  Vec<T> kl_pq_, kl_qp_;
};

// Some rows in memory, side by side, to vectors of one class each, and back. A last tile that is not full reaches into
// the rows behind its own; with `more` there are some behind the last as well. On the way back they are written later.
template <typename T, bool more>
void turn_in(const T* rows, int cols, Vec<T>* out) {
  constexpr int N = kLanes<T>;
  for (int j = 0; j < cols; j += N) {
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) {
      const T* const from = rows + i * cols + j;
      const int left = N * cols - (i * cols + j);
      out[j + i] = more || left >= N ? load(from) : load_n(from, left, T(0));
    }
    transpose<T>(out + j);
  }
}
template <typename T, bool more, typename F>
SK_INLINE void turn_out(F&& column, int cols, T* rows) {
  constexpr int N = kLanes<T>;
  for (int j = (cols - 1) / N * N; j >= 0; j -= N) {
    Vec<T> tile[N];
    if (j + N <= cols)
#pragma GCC unroll 32
      for (int i = 0; i < N; ++i) tile[i] = column(j + i);
    else
      for (int i = 0; j + i < cols; ++i) tile[i] = column(j + i);
    transpose<T>(tile);
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) {
      T* const to = rows + i * cols + j;
      const int left = N * cols - (i * cols + j);
      more || left >= N ? store(to, tile[i]) : store_n(to, tile[i], left);
    }
  }
}
// The same with fewer rows than lanes
template <typename T>
void turn_few_in(const T* rows, int count, int cols, Vec<T>* out) {
  for (int i = 0; i < count; ++i)
    for (int j = 0; j < cols; ++j) reinterpret_cast<T*>(out)[j * kLanes<T> + i] = rows[i * cols + j];
}
template <typename T, typename F>
SK_INLINE void turn_few_out(F&& column, int count, int cols, T* rows) {
  for (int j = 0; j < cols; ++j) {
    const Vec<T> x = column(j);
    for (int i = 0; i < count; ++i) rows[i * cols + j] = x[i];
  }
}

// `cols` values of any dtype and stride in contiguous T, and back.
template <typename T, typename S>
void widen(const S* x, int64_t stride, int64_t cols, T* out) {
  constexpr int N = kLanes<T>;
  int64_t j = 0;
  if (stride == 1) {
#pragma GCC unroll 4
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
#pragma GCC unroll 4
  for (; j + N <= cols; j += N) store(out + j, load(x + j));
  if (j < cols) store_some(out + j, load_some(x + j, int(cols - j)), int(cols - j));
}

template <typename T>
constexpr ScalarType kDtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

template <typename T>
void widen(const void* x, ScalarType dtype, int64_t stride, int64_t cols, T* out) {
  if (dtype == kDtype<T>) widen(static_cast<const T*>(x), stride, cols, out);
  else if constexpr (std::is_same_v<T, float>) {
    if (dtype == ScalarType::Half) widen(static_cast<const fp16*>(x), stride, cols, out);
    else widen(static_cast<const bf16*>(x), stride, cols, out);
  }
}

// Some columns of a row in contiguous T: where they lie if they are that already, else in scratch.
template <typename T>
const T* columns_in(const Rows& x, const void* row, int64_t begin, int64_t cols, T* scratch) {
  const int64_t stride = x.column_stride();
  const void* const from = static_cast<const char*>(row) + begin * stride * x.itemsize();
  if (x.dtype() == kDtype<T> && stride == 1) return static_cast<const T*>(from);
  widen(from, x.dtype(), stride, cols, scratch);
  return scratch;
}

// `count` rows in the same way
template <typename T>
const T* rows_in(const Rows& x, int64_t first, int64_t count, T* scratch) {
  if (x.contiguous()) return columns_in(x, x.row(first), 0, count * x.cols(), scratch);
  if (count == 1) return columns_in(x, x.row(first), 0, x.cols(), scratch);
  for (int64_t i = 0; i < count; ++i)
    widen(x.row(first + i), x.dtype(), x.column_stride(), x.cols(), scratch + i * x.cols());
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

// Rows of any length, some together: a stage of all before the next of any, so that none waits for the last sums of the
// one before it.
template <typename T>
class LongRows {
 public:
  explicit LongRows(const SymmetricKLJob& job)
      : job_(job),
        cols_(job.a.cols()),
        together_(int(std::clamp<int64_t>(kTogether / cols_, 1, kMaxTogether))),
        blocks_((cols_ + kBlock<T> - 1) / kBlock<T>),
        grad_a_{static_cast<char*>(job.grad_a), job.a.dtype()},
        grad_b_{static_cast<char*>(job.grad_b), job.b.dtype()},
        side_(std::min(cols_, kBlock<T>)),
        room_(new T[2 * (together_ + 1) * side_ + (waits_apart() ? 2 * together_ * cols_ : 0)]),
        done_(new Block<T>[together_ * blocks_]) {}

  void run(int64_t begin, int64_t end) {
    T* const losses = static_cast<T*>(job_.losses);
    for (int64_t first = begin; first < end; first += together_) {
      const int count = int(std::min<int64_t>(together_, end - first));
      for (int i = 0; i < count; ++i) start(i, first + i);
      for (int64_t k = 0; k < blocks_; ++k) {
        Survey<T> at[kMaxTogether];
        for (int i = 0; i < count; ++i)
          if (rows_[i].counts) at[i] = look(i, k);
        for (int i = 0; i < count; ++i)
          if (rows_[i].counts) sum(i, k, at[i]);
      }
      for (int i = 0; i < count; ++i)
        if (rows_[i].counts) settle(i);
      for (int i = 0; i < count; ++i) write(i, first + i, std::min(first + i + together_, end - 1));
      if (losses)
        for (int i = 0; i < count; ++i) losses[first + i] = rows_[i].loss;
    }
  }

 private:
  bool waits_apart() const { return job_.wait && !(grad_a_.direct() && grad_b_.direct()); }
  T* waiting(T* row, int64_t at) const { return job_.wait ? row + at : nullptr; }
  int64_t begin(int64_t block) const { return block * kBlock<T>; }
  int64_t size(int64_t block) const { return std::min(kBlock<T>, cols_ - begin(block)); }
  const T* a(int i, int64_t k) { return columns_in(job_.a, rows_[i].a, begin(k), size(k), room_.get() + 2 * i * side_); }
  const T* b(int i, int64_t k) {
    return columns_in(job_.b, rows_[i].b, begin(k), size(k), room_.get() + (2 * i + 1) * side_);
  }

  void start(int i, int64_t index) {
    const T* const weight = static_cast<const T*>(job_.weight);
    const T* const upstream = static_cast<const T*>(job_.upstream);
    const T factor = weight ? weight[index] : T(1);
    const T scale = upstream ? upstream[job_.upstream_rows ? index : 0] : T(1);
    LongRow<T>& row = rows_[i];
    row = {job_.a.row(index), job_.b.row(index), T(job_.scale) * scale * factor};
    if (job_.wait) {
      const int64_t each = waits_apart() ? cols_ : 0;
      T* const wait = room_.get() + (waits_apart() ? 2 * (together_ + 1) * side_ + 2 * i * cols_ : 0);
      row.wait_a = grad_a_.at(index * cols_, wait);
      row.wait_b = grad_b_.at(index * cols_, wait + each);
    }
    row.blocks = done_.get() + i * blocks_;
    row.counts = factor != T(0);
  }

  Survey<T> look(int i, int64_t k) {
    return survey(a_[i] = a(i, k), b_[i] = b(i, k), size(k), rows_[i].careful);
  }

  void sum(int i, int64_t k, const Survey<T>& at) {
    LongRow<T>& row = rows_[i];
    Block<T>& block = row.blocks[k];
    if (row.careful && std::max(at.max_b, row.max_b) == -kInf<T>) {  // no class yet
      block.done = false;
      return;
    }
    advance(row, at, block);
    const int64_t ahead = k + 1 < blocks_ ? kBlock<T> : 0;
    const int64_t step = row.careful ? 2 * kLanes<T> : kBlock<T>, cols = size(k);
    for (int64_t j = 0; j < cols; j += step) {
      T *const wait_a = waiting(row.wait_a, begin(k) + j), *const wait_b = waiting(row.wait_b, begin(k) + j);
      const auto each = [&](auto near, auto wait) SK_LAMBDA {
        gather<T, near, wait>(
            row, a_[i] + j, b_[i] + j, std::min(step, cols - j), ahead, wait_a, wait_b);
      };
      const auto one = [&](auto near) SK_LAMBDA { job_.wait ? each(near, std::true_type{}) : each(near, std::false_type{}); };
      block.near ? one(std::true_type{}) : one(std::false_type{});
    }
  }

  // What follows from a row's sums. If they are not finite, first what kind of row it is.
  void settle(int i) {
    LongRow<T>& row = rows_[i];
    const Sums& of = row.sums;
    if (!((of.w + of.wd + of.x + of.xd) * 0 == 0)) {
      bool undefined = false, one_sided = false, any_a = false, any_b = false;
      for (int64_t k = 0; k < blocks_; ++k) {
        const T *const a = this->a(i, k), *const b = this->b(i, k);
        for (int64_t j = 0; j < size(k); ++j) {
          undefined |= !(a[j] < kInf<T>) || !(b[j] < kInf<T>);
          any_a |= a[j] != -kInf<T>;
          any_b |= b[j] != -kInf<T>;
          one_sided |= (a[j] == -kInf<T>) != (b[j] == -kInf<T>);
        }
      }
      undefined |= !any_a || !any_b;
      if (undefined || one_sided) {
        row.counts = false;
        row.loss = undefined ? kNan<T> : kInf<T>;
        return;
      }
      LongRow<T> again{row.a, row.b, row.scale, row.wait_a, row.wait_b, row.blocks, true, true};
      row = again;
      for (int64_t k = 0; k < blocks_; ++k) sum(i, k, look(i, k));
    }
    conclude(row);
  }

  // The block of another row that is to be read later
  Next ahead(int64_t index, int64_t k) const {
    const auto at = [&](const Rows& x, const void* row) {
      return static_cast<const char*>(row) + begin(k) * x.column_stride() * x.itemsize();
    };
    const auto step = [&](const Rows& x) { return job_.ahead ? x.column_stride() * x.itemsize() : 0; };
    return {at(job_.a, job_.a.row(index)), at(job_.b, job_.b.row(index)), step(job_.a), step(job_.b)};
  }

  // Its loss and its gradients
  void write(int i, int64_t index, int64_t next) {
    LongRow<T>& row = rows_[i];
    const bool apart = !row.near && std::min(row.kl_pq, row.kl_qp) >= kApart<T>;
    double loss = 0;
    for (int64_t k = 0; k < blocks_; ++k) {
      const int64_t at = index * cols_ + begin(k), cols = size(k);
      T* const buffer = room_.get() + 2 * together_ * side_;
      T* const to_a = grad_a_.at(at, buffer);
      T* const to_b = grad_b_.at(at, buffer + side_);
      if (row.counts) {
        if (blocks_ > 1) a_[i] = a(i, k), b_[i] = b(i, k);
        const Block<T>& block = row.blocks[k];
        const Wanted<T> want{job_.detach_targets, grad_a_.data ? to_a : nullptr, grad_b_.data ? to_b : nullptr};
        const auto go = [&]<Way way>(std::integral_constant<Way, way>) SK_LAMBDA {
          const bool waiting = job_.wait && block.done && (way == Way::near || !block.near);
          const auto f = waiting ? finish<T, way, true> : finish<T, way, false>;
          const T *const wait_a = this->waiting(row.wait_a, begin(k)), *const wait_b = this->waiting(row.wait_b, begin(k));
          return f(row, block, a_[i], b_[i], cols, wait_a, wait_b, want, ahead(next, k));
        };
        loss += row.near ? go(std::integral_constant<Way, Way::near>{})
                : apart  ? go(std::integral_constant<Way, Way::apart>{})
                         : go(std::integral_constant<Way, Way::far>{});
      } else {
        const T gradient = row.loss == T(0) ? T(0) : kNan<T>;
        if (grad_a_.data) std::fill_n(to_a, cols, gradient);
        if (grad_b_.data) std::fill_n(to_b, cols, gradient);
      }
      grad_a_.round(to_a, at, cols);
      grad_b_.round(to_b, at, cols);
    }
    if (row.counts) row.loss = T(loss);
  }

  const SymmetricKLJob& job_;
  const int64_t cols_;
  const int together_;
  const int64_t blocks_;
  const Gradient<T> grad_a_, grad_b_;
  const int64_t side_;  // elements of a block
  // For each row a block of either side, for all a block of either gradient; the exponentials of each.
  const std::unique_ptr<T[]> room_;
  const std::unique_ptr<Block<T>[]> done_;
  LongRow<T> rows_[kMaxTogether];
  const T *a_[kMaxTogether], *b_[kMaxTogether];
};

template <typename T>
void run_short(const SymmetricKLJob& job, int64_t begin, int64_t end) {
  constexpr int N = kLanes<T>;
  const int64_t cols = job.a.cols();
  const T* const weight = static_cast<const T*>(job.weight);
  const T* const upstream = static_cast<const T*>(job.upstream);
  T* const losses = static_cast<T*>(job.losses);
  const Gradient<T> grad_a{static_cast<char*>(job.grad_a), job.a.dtype()};
  const Gradient<T> grad_b{static_cast<char*>(job.grad_b), job.b.dtype()};
  const T* const row_upstream = job.upstream_rows ? upstream : nullptr;
  const T common = T(job.scale * (upstream && !row_upstream ? upstream[0] : T(1)));

  ShortRows<T> of;
  const T own = job.detach_targets ? T(0) : T(1);
  T scratch[kMaxTransposed * N + N];
  std::memset(of.a, 0, cols * sizeof *of.a);  // lanes that never hold a row hold numbers
  std::memset(of.b, 0, cols * sizeof *of.b);
  for (int64_t first = begin; first < end; first += N) {
    const int count = int(std::min<int64_t>(N, end - first));
    const bool more = first + 2 * N <= end;
    const auto read = [&](const Rows& x, Vec<T>* out) SK_LAMBDA {
      const T* const rows = rows_in(x, first, count, scratch);
      if (count < N) turn_few_in(rows, count, int(cols), out);
      else if (more || rows == scratch) turn_in<T, true>(rows, int(cols), out);
      else turn_in<T, false>(rows, int(cols), out);
    };
    read(job.a, of.a);
    read(job.b, of.b);
    Vec<T> scale = set1(common);
    if (row_upstream) scale *= load_n(row_upstream + first, count, T(0));
    if (weight) {
      const Vec<T> factor = load_n(weight + first, count, T(1));
      scale *= factor;
      for (int64_t j = 0; j < cols; ++j) {  // without weight: as if the logits were equal
        of.a[j] = factor == Vec<T>{} ? Vec<T>{} : of.a[j];
        of.b[j] = factor == Vec<T>{} ? Vec<T>{} : of.b[j];
      }
    }
    of.run(int(cols));
    scale = of.undefined | of.infinite ? set1(kNan<T>) : scale;
    if (losses) store_n(losses + first, of.undefined ? set1(kNan<T>) : of.infinite ? set1(kInf<T>) : of.loss, count);
    const auto write = [&](const Gradient<T>& grad, auto&& column) SK_LAMBDA {
      if (!grad.data) return;
      T* const rows = grad.at(first * cols, scratch);
      if (count < N) turn_few_out<T>(column, count, int(cols), rows);
      else if (more || rows == scratch) turn_out<T, true>(column, int(cols), rows);
      else turn_out<T, false>(column, int(cols), rows);
      grad.round(rows, first * cols, count * cols);
    };
    write(grad_a, of.grad_a(scale, scale * own));
    write(grad_b, of.grad_b(scale, scale * own));
  }
}

template <typename T>
void run_rows(const SymmetricKLJob& job, int64_t begin, int64_t end) {
  if (job.a.cols() <= kMaxTransposed) run_short<T>(job, begin, end);
  else LongRows<T>(job).run(begin, end);
}

void symmetric_kl_rows(const SymmetricKLJob& job, int64_t begin, int64_t end) {
  if (job.a.dtype() == ScalarType::Double) run_rows<double>(job, begin, end);
  else run_rows<float>(job, begin, end);
}

}  // namespace smart_kernels::SK_ISA
