// Divergences of rows of logits a, b with p = softmax(a / T), q = softmax(b / T), t = log(p / q); for the symmetric KL
//
//   loss = sum (p - q) t,   d loss/da = p (t - KL(p||q)) + (p - q),   d loss/db = -q (t + KL(q||p)) - (p - q),
//
// and for any other kind what kinds.h says. No log-softmaxes are subtracted: d = (a - b) / T is centred on the value it
// has where b is largest,
//
//   s = log1p(sum q expm1(d)) = logsumexp(a / T) - logsumexp(b / T),   t = d - s,   p - q = q expm1(t).
//
// A row is "near" where all |d| <= 1/2: there everything follows from q and expm1(d). Elsewhere both softmaxes are
// taken, s is the logarithm of their sums' ratio, and p - q is their plain difference where |t| > 1/2.
// The loss is a sum of terms >= 0, so nothing cancels.
//
// Long rows are read twice, block by block: once for the sums, where each block is looked at before (it lies in the
// first cache by then), once for the gradients; in between once more for kinds whose gradients need further sums. Rows
// of up to kMaxTransposed classes are turned so that each lane holds a row of its own.

#include "cpu/kinds.h"

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
// How far exponents may rise above 0 before a block's sums are taken again. The classes that these count from are then
// among the likeliest, so that rounding far from them is as harmless as it is far from the likeliest.
constexpr double kRise = 2;
// After so many blocks that were done again, those of a row are looked at before their sums.
constexpr int kSurprises = 3;
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
  if (!masked)
    for (; j + N <= end; j += N) f(std::false_type{}, j, N);
  for (; j < end; j += N) f(std::true_type{}, j, static_cast<int>(std::min<int64_t>(N, end - j)));
}

// The first n lanes, all of them written as one
template <typename S, typename V>
SK_INLINE void put(S* p, V x, int n) {
  n == int(sizeof(V) / sizeof x[0]) ? store(p, x) : store_n(p, x, n);
}

template <typename T>
struct Pair {
  Vec<T> a, b, d;   // d = a - b, not centred; 0 for an absent class
  Mask<T> absent;
};

// Of logits of type S. With `given`, what stands for a is the difference a - b, with digits that a and b have not.
template <typename T, bool checked, bool given, typename S>
SK_INLINE Pair<T> load_pair(const S* a, const S* b, int64_t j, int n) {
  Pair<T> x;
  if constexpr (checked) {
    x.b = load_n(b + j, n, -kInf<T>);
    const Vec<T> other = load_n(a + j, n, given ? T(0) : -kInf<T>);
    x.a = given ? x.b + other : other;
    x.absent = (x.a == -kInf<T>) & (x.b == -kInf<T>);
    x.d = x.absent ? Vec<T>{} : given ? other : x.a - x.b;
  } else {
    x.b = load(b + j);
    const Vec<T> other = load(a + j);
    x.a = given ? x.b + other : other;
    x.d = given ? other : x.a - x.b;
  }
  return x;
}

// What the classes of a block are like: the largest logits, and how far d goes. NaN is not seen; the sums will have it.
template <typename T>
struct Survey {
  T max_a, max_b, low, high;
};

template <typename T>
struct Surveyor {
  Vec<T> max_a, max_b, low, high;

  SK_INLINE Surveyor() : max_a(set1(-kInf<T>)), max_b(max_a), low(set1(kInf<T>)), high(max_a) {}
  template <bool checked>
  SK_INLINE void see(const Pair<T>& x) {
    max_a = vmax(x.a, max_a);
    max_b = vmax(x.b, max_b);
    low = vmin(checked ? (x.absent ? low : x.d) : x.d, low);
    high = vmax(checked ? (x.absent ? high : x.d) : x.d, high);
  }
  SK_INLINE Survey<T> seen() const {
    return {reduce_max<T>(max_a), reduce_max<T>(max_b), reduce_min<T>(low), reduce_max<T>(high)};
  }
};

template <typename T, bool given, typename S>
Survey<T> survey(const S* a, const S* b, int64_t cols, bool masked) {
  Surveyor<T> surveyor;
  for_columns<T>(0, cols, masked, [&](auto checked, int64_t j, int n) SK_LAMBDA {
    surveyor.template see<checked>(load_pair<T, checked, given>(a, b, j, n));
  });
  return surveyor.seen();
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
  double inverse;      // 1 / temperature
  T *wait_a, *wait_b;  // where its exponentials wait, if they may
  Block<T>* blocks;
  bool counts;         // still: there is something to find out
  bool careful = false;  // classes may be absent, sums of some classes may overflow
  int surprises = 0;     // blocks that were not like those before
  T loss = 0;

  bool near = true;
  T max_a = -kInf<T>, max_b = -kInf<T>, low = kInf<T>, high = -kInf<T>;
  Sums sums{};

  T inv_a = 0, inv_b = 0;          // p = v inv_a, q = w inv_b
  T s = 0, ratio = 0, offset = 0;  // t = d - s; near: exp(-s), expm1(-s)
  T kl_pq = 0, kl_qp = 0;
  bool apart = false;  // the rounding of p and q does not show in the gradients

  T centre() const { return max_a - max_b; }
  // Of some classes, done as near or far
  void add(const Sums& of, bool as_near) {
    const bool add_w = as_near && !near;
    sums.w += of.w;
    sums.wd += of.wd;
    sums.x += add_w ? of.x + of.w : of.x;
    sums.xd += add_w ? of.xd + of.wd : of.xd;
  }
  bool within(T low, T high, T centre) const { return double(std::max(high - centre, centre - low)) * inverse <= kNear<T>; }
};

// With `scaled`, x / T; without, the temperature is 1.
template <bool scaled, typename T, typename V>
SK_INLINE V tempered(const LongRow<T>& row, V x) {
  if constexpr (scaled) return x * T(row.inverse);
  else return x;
}

// An absent class has no difference. One that is masked on one side alone has as large a one as there is, in a row that is
// known to be finite for all that; before, it has to show in the sums.
template <typename T, bool checked>
SK_INLINE Vec<T> difference(const LongRow<T>& row, const Pair<T>& x, Vec<T> d) {
  if constexpr (!checked) return d;
  const Vec<T> most = set1(std::numeric_limits<T>::max());
  if (row.careful) d = vmin(vmax(d, -most), most);
  return x.absent ? Vec<T>{} : d;
}

// The row's maxima, and with them the centre of d, move on to those of what was seen; the sums follow.
template <typename T>
void advance(LongRow<T>& row, const Survey<T>& at, Block<T>& block) {
  const T max_a = std::max(row.max_a, at.max_a), max_b = std::max(row.max_b, at.max_b), centre = max_a - max_b;
  row.low = std::min(row.low, at.low);
  row.high = std::max(row.high, at.high);
  // At a centre so far that d is rounded to more than 1/64, equal d may be of logits that are not.
  const bool resolved = std::abs(centre) * row.inverse < T(1) / (64 * std::numeric_limits<T>::epsilon());
  block = {max_a, max_b, resolved && row.within(at.low, at.high, centre), true};
  Sums& of = row.sums;
  const bool moves = (max_a != row.max_a || max_b != row.max_b) && of.w > 0;
  const double shift = moves ? (double(centre) - row.centre()) * row.inverse : 0;
  if (row.near && (!block.near || std::abs(shift) > 2 * kNear<T>)) {
    row.near = false;
    of.x += of.w;
    of.xd += of.wd;
  }
  if (moves) {
    const double w = std::exp((double(row.max_b) - max_b) * row.inverse);
    const double wd = of.wd - shift * of.w, xd = of.xd - shift * of.x;
    if (row.near) {  // w (exp(d - shift) - 1) = exp(-shift) x + expm1(-shift) w
      const double less = std::expm1(-shift);
      of.x = w * ((1 + less) * of.x + less * of.w);
      of.xd = w * ((1 + less) * xd + less * wd);
    } else {
      const double v = std::exp((double(row.max_a) - max_a) * row.inverse);
      of.x *= v;
      of.xd = v * xd;
    }
    of.w *= w;
    of.wd = w * wd;
  }
  row.max_a = max_a;
  row.max_b = max_b;
}

// The sums over some classes of a block; with `watch`, what these are like. What waits is w, and v or expm1(d). The next
// block, `ahead`, is asked for meanwhile.
template <typename T, bool given, bool near, bool wait, bool scaled, bool watch, typename S>
Survey<T> gather(const LongRow<T>& row, const S* a, const S* b, int64_t cols, int64_t ahead, T* wait_a, T* wait_b, Sums& sums) {
  const T max_a = row.max_a, max_b = row.max_b, centre = row.centre();
  Vec<T> vw{}, vwd{}, vx{}, vxd{};
  Surveyor<T> surveyor;
  for_columns<T>(0, cols, row.careful, [&](auto checked, int64_t j, int n) SK_LAMBDA {
    __builtin_prefetch(a + j + ahead);
    __builtin_prefetch(b + j + ahead);
    const Pair<T> y = load_pair<T, checked, given>(a, b, j, n);
    if constexpr (watch) surveyor.template see<checked>(y);
    const Vec<T> d = difference<T, checked>(row, y, tempered<scaled>(row, y.d - centre));
    const Vec<T> w = exponential<T>(tempered<scaled>(row, y.b - max_b));
    Vec<T> x = near ? expm1_small<T>(d) : exponential<T>(tempered<scaled>(row, y.a - max_a));
    if constexpr (wait) put(wait_b + j, w, n), put(wait_a + j, x, n);
    if constexpr (near) x = w * x;
    vw += w;
    vwd += w * d;
    vx += x;
    vxd += x * d;
  });
  sums = {reduce_add<T>(vw), reduce_add<T>(vwd), reduce_add<T>(vx), reduce_add<T>(vxd)};
  return surveyor.seen();
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
  row.near = row.near && row.within(row.low, row.high, row.centre());
  row.inv_a = T(inv_v);
  row.inv_b = T(inv_w);
  row.s = T(s);
  row.kl_pq = T(p_d - s);
  row.kl_qp = T(s - q_d);
}

// Where a block's gradients go, each null if it is not wanted
template <typename S>
struct Wanted {
  bool detach;
  S *grad_a, *grad_b, *both;  // the last for their sum
};

// What stays of each class where gradients need sums that come last: p, q, and of both sides the slopes that are wanted.
template <typename T>
struct Kept {
  T *p, *q, *slope_a, *slope_b;

  Kept at(int64_t j) const { return {p + j, q + j, slope_a ? slope_a + j : nullptr, slope_b ? slope_b + j : nullptr}; }
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

// A row's classes, once all of its sums are known, as they are read in a block
template <typename T, typename S, bool given, Way way, bool waiting, bool scaled>
class Reader {
 public:
  Reader(const LongRow<T>& row, const Block<T>& block, const S* a, const S* b, const T* wait_a, const T* wait_b)
      : row_(row), a_(a), b_(b), wait_a_(wait_a), wait_b_(wait_b), max_a_(row.max_a), max_b_(row.max_b),
        centre_(row.centre()), s_(row.s), inv_a_(row.inv_a), inv_b_(row.inv_b), ratio_(row.ratio), offset_(row.offset) {
    if (!waiting || (block.max_a == max_a_ && block.max_b == max_b_)) return;
    // the maxima have moved on since
    inv_a_ = T(inv_a_ * std::exp((double(block.max_a) - max_a_) * row.inverse));
    inv_b_ = T(inv_b_ * std::exp((double(block.max_b) - max_b_) * row.inverse));
    const double shift = ((double(max_a_) - max_b_) - T(block.max_a - block.max_b)) * row.inverse;
    offset_ = T(offset_ + ratio_ * std::expm1(-shift));
    ratio_ = T(ratio_ * std::exp(-shift));
  }

  template <bool checked>
  SK_INLINE Classes<T> read(int64_t j, int n) const {
    const Pair<T> y = load_pair<T, checked, given>(a_, b_, j, n);
    const Vec<T> d = difference<T, checked>(row_, y, tempered<scaled>(row_, y.d - centre_));
    const Vec<T> t = d - s_;
    Vec<T> p, q, x;  // rounded: the same bits whichever gradients are wanted
    if constexpr (waiting) q = load_n(wait_b_ + j, n, T(0));
    else q = exponential<T>(tempered<scaled>(row_, y.b - max_b_));
    q = rounded(q * inv_b_);
    if constexpr (way == Way::near) {
      Vec<T> e;
      if constexpr (waiting) e = load_n(wait_a_ + j, n, T(0));
      else e = expm1_small<T>(d);
      x = q * (e * ratio_ + offset_);  // q expm1(d - s)
      p = q + x;
    } else {
      if constexpr (waiting) p = load_n(wait_a_ + j, n, T(0));
      else p = exponential<T>(tempered<scaled>(row_, y.a - max_a_));
      p = rounded(p * inv_a_);
      x = p - q;
      if constexpr (way == Way::far) x = vabs<T>(t) <= kNear<T> ? q * expm1_small<T>(t) : x;
    }
    return {p, q, x, t};
  }

 private:
  const LongRow<T>& row_;
  const S *a_, *b_;
  const T *wait_a_, *wait_b_;
  T max_a_, max_b_, centre_, s_, inv_a_, inv_b_, ratio_, offset_;
};

// The loss of a block's classes, their gradients written
template <typename T, bool given, Way way, bool waiting, bool scaled, typename S>
double finish(
    const LongRow<T>& row, const Block<T>& block, const S* a, const S* b, int64_t cols, const T* wait_a,
    const T* wait_b, const Wanted<S>& want, const Next next) {
  const Reader<T, S, given, way, waiting, scaled> classes(row, block, a, b, wait_a, wait_b);
  const T scale = row.scale, own = want.detach ? T(0) : scale, own_pq = own * row.kl_pq, own_qp = own * row.kl_qp;
  S *const grad_a = want.grad_a, *const grad_b = want.grad_b;
  Vec<T> loss{};
  for_columns<T>(0, cols, row.careful, [&](auto checked, int64_t j, int n) SK_LAMBDA {
    next.prefetch(j);
    const Classes<T> of = classes.template read<checked>(j, n);
    loss += of.x * of.t;
    const Vec<T> scaled_x = rounded(of.x * scale);
    if (grad_a) put(grad_a + j, of.p * (of.t * own - own_pq) + scaled_x, n);
    if (grad_b) put(grad_b + j, of.q * (of.t * -own - own_qp) - scaled_x, n);
  });
  return reduce_add<T>(loss);
}

// The same for any other kind: what a block adds to the totals of its row, its classes kept if they shall be, or with these
// totals its gradients. Of any kind where the sum of both gradients is wanted, which is of second order: it takes the loss
// itself, free of what KL(p||q) is off by.
template <typename T, bool given, Kind kind, Way way, bool waiting, bool sums, bool gradients, typename S>
void finish_kind(
    const LongRow<T>& row, const Block<T>& block, const S* a, const S* b, int64_t cols, const T* wait_a,
    const T* wait_b, const Wanted<S>& want, const Kept<T>& kept, const Next next, T beta, Totals& totals) {
  const Reader<T, S, given, way, waiting, true> classes(row, block, a, b, wait_a, wait_b);
  const Gradients<kind, T> given_sums(totals, row.scale);
  S *const grad_a = want.grad_a, *const grad_b = want.grad_b;
  T *const slopes_a = kept.slope_a, *const slopes_b = kept.slope_b;
  constexpr bool of_slopes = way == Way::apart && !gradients && loss_of_slopes(kind);
  Vec<T> term{}, slope_a{}, slope_b{};
  for_columns<T>(0, cols, row.careful, [&](auto checked, int64_t j, int n) SK_LAMBDA {
    if constexpr (gradients || (!given && keeps(kind))) next.prefetch(j);
    const Classes<T> of = classes.template read<checked>(j, n);
    Parts<T> part = parts<kind, T, way>(of, beta);
    if constexpr (sums && !of_slopes) term += rounded(part.term);
    if constexpr (sums && !gradients) {
      part.slope_a = rounded(part.slope_a), part.slope_b = rounded(part.slope_b);
      slope_a += part.slope_a, slope_b += part.slope_b;
      if (slopes_a) put(slopes_a + j, part.slope_a, n), put(kept.p + j, of.p, n);
      if (slopes_b) put(slopes_b + j, part.slope_b, n), put(kept.q + j, of.q, n);
    }
    if constexpr (gradients) {
      if (grad_a) put(grad_a + j, given_sums.a(of, part), n);
      if (grad_b) put(grad_b + j, given_sums.b(of, part), n);
      if constexpr (given)
        if (want.both) put(want.both + j, given_sums.both(of, part), n);
    }
  });
  if constexpr (sums && !of_slopes) totals.loss += reduce_add<T>(term);
  if constexpr (sums && !gradients) totals.mean_a += reduce_add<T>(slope_a), totals.mean_b += reduce_add<T>(slope_b);
  if constexpr (of_slopes) totals.loss = totals.mean_a + totals.mean_b;
}

// One side's gradient from what was kept; it may take the slopes' place.
template <Kind kind, typename T, typename S>
void centre(T scale, const T* p, const T* slope, int64_t cols, T mean, T other_mean, T loss, S* grad) {
  for_columns<T>(0, cols, false, [&](auto checked, int64_t j, int n) SK_LAMBDA {
    const Vec<T> its_p = checked ? load_n(p + j, n, T(0)) : load(p + j);
    const Vec<T> its_slope = checked ? load_n(slope + j, n, T(0)) : load(slope + j);
    put(grad + j, scale * centred<kind, T>(its_p, its_slope, mean, other_mean, loss), n);
  });
}

// kLanes rows at once, turned: vector j holds class j of each, with room for a tile that is not full.
template <typename T>
class ShortRows {
 public:
  explicit ShortRows(const DivergenceJob& job)
      : symmetric_(job.kind == Kind::symmetric_kl), beta_(T(job.beta)), inverse_(T(job.inverse)),
        greatest_(T(job.greatest)) {}

  Vec<T> a[kMaxTransposed + kLanes<T>], b[kMaxTransposed + kLanes<T>];  // logits, then p and q
  Vec<T> loss;
  Mask<T> undefined, infinite;

  template <Kind kind, bool scaled>
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
        const Mask<T> no_a = a[j] == -kInf<T>, no_b = b[j] == -kInf<T>;
        undefined |= ~(a[j] < kInf<T>) | ~(b[j] < kInf<T>);
        if (infinite_without_p(kind)) infinite |= no_a & ~no_b;
        if (infinite_without_q(kind)) infinite |= no_b & ~no_a;
        const Vec<T> most = set1(std::numeric_limits<T>::max() / (inverse_ > 1 ? 2 * inverse_ : T(1)));  // finite over T
        t_[j] = no_a & no_b ? centre : vmin(vmax(t_[j], -most), most);
        low = vmin(t_[j], low);
        high = vmax(t_[j], high);
      }
    }
    const Mask<T> near = vmax(high - centre, centre - low) * inverse_ <= kNear<T>;
    if (!any<T>(~near)) sum<kind, scaled, true, false>(max_a, max_b, near, cols);
    else if (!any<T>(near)) sum<kind, scaled, false, true>(max_a, max_b, near, cols);
    else sum<kind, scaled, true, true>(max_a, max_b, near, cols);
  }

  bool symmetric() const { return symmetric_; }

  // f(j) of the symmetric KL's gradient of either side, each times `scale`, and `own` times that where it is not p - q
  SK_INLINE auto grad_a(Vec<T> scale, Vec<T> own) const {
    return [=, this, constant = own * kl_pq_](int j)
               SK_LAMBDA { return a[j] * (t_[j] * own - constant) + rounded(x_[j] * scale); };
  }
  SK_INLINE auto grad_b(Vec<T> scale, Vec<T> own) const {
    return [=, this, constant = own * kl_qp_](int j)
               SK_LAMBDA { return b[j] * (t_[j] * -own - constant) - rounded(x_[j] * scale); };
  }

  // f(j) of any other kind's
  SK_INLINE auto grad_a(Vec<T> scale) const {
    return [=, this](int j) SK_LAMBDA { return x_[j] * scale; };
  }
  SK_INLINE auto grad_b(Vec<T> scale) const {
    return [=, this](int j) SK_LAMBDA { return t_[j] * scale; };
  }

 private:
  template <bool scaled>
  SK_INLINE Vec<T> tempered(Vec<T> x) const {
    if constexpr (scaled) return x * inverse_;
    else return x;
  }

  // All rows near, all far, or both ways for both kinds: the bits of a row must not depend on the rows beside it.
  template <Kind kind, bool scaled, bool some_near, bool some_far>
  __attribute__((noinline)) void sum(Vec<T> max_a, Vec<T> max_b, Mask<T> near, int cols) {
    const Vec<T> centre = max_a - max_b;
    Vec<T> sum_a{}, sum_b{}, p_d{}, q_d{}, drift{};
    for (int j = 0; j < cols; ++j) {
      const Vec<T> w = exponential<T>(tempered<scaled>(b[j] - max_b)), d = tempered<scaled>(t_[j] - centre);
      sum_b += w;
      if constexpr (some_near) {
        const Vec<T> e = expm1_small<T>(d);
        drift += w * e;
        x_[j] = e;
      }
      if constexpr (some_far) {
        const Vec<T> v = exponential<T>(tempered<scaled>(a[j] - max_a));
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
          if constexpr (kind == Kind::symmetric_kl) kl_pq += p * t, kl_qp -= q * t;
        }
        if constexpr (some_far) {
          const Vec<T> far_p = rounded(a[j] * inv_a);
          Vec<T> far_x = far_p - q;
          if constexpr (close_ones) far_x = (vabs<T>(t) <= kNear<T>) & ~apart ? q * expm1_small<T>(t) : far_x;
          x = near ? x : far_x;
          p = near ? p : far_p;
        }
        if constexpr (kind == Kind::symmetric_kl) {
          loss += x * t;
          t_[j] = t;
          x_[j] = x;
        } else {
          const Parts<T> part = parts<kind, T>({p, q, x, t}, beta_);
          loss += rounded(part.term);
          kl_pq += x_[j] = rounded(part.slope_a);
          kl_qp += t_[j] = rounded(part.slope_b);
        }
        a[j] = p;
        b[j] = q;
      }
    };
    if (kind == Kind::symmetric_kl && some_far && all_apart) finish(std::false_type{});
    else finish(std::true_type{});
    if constexpr (kind == Kind::symmetric_kl && some_far) {
      kl_pq = near ? kl_pq : far_pq;
      kl_qp = near ? kl_qp : far_qp;
    }
    this->loss = loss;
    kl_pq_ = kl_pq;
    kl_qp_ = kl_qp;
    if constexpr (kind != Kind::symmetric_kl) {  // these are sums of slopes
      for (int j = 0; j < cols; ++j) {
        x_[j] = centred<kind, T>(a[j], x_[j], kl_pq, kl_qp, loss);
        t_[j] = centred<kind, T>(b[j], t_[j], kl_qp, kl_pq, loss);
      }
      this->loss = vmin(vmax(loss, Vec<T>{}), set1(greatest_));
    }
  }

  const bool symmetric_;
  const T beta_, inverse_, greatest_;
  // a - b, d, t = log(p / q) by turns; p - q. Of other kinds the gradient of b; that of a.
  Vec<T> t_[kMaxTransposed], x_[kMaxTransposed];
  Vec<T> kl_pq_, kl_qp_;
};

// As many whole vectors as there are classes hold a row for each lane: element i * cols + j is class j of row i. Lane
// `lane` of what is number `out` when turned, or turned back, comes from this vector and this place in it.
template <typename T, int cols, bool back>
constexpr std::pair<int, int> origin(int out, int lane) {
  constexpr int N = kLanes<T>;
  const int element = back ? out * N + lane : lane * cols + out;
  return back ? std::pair(element % cols, element / cols) : std::pair(element / N, element % N);
}
template <typename T, int cols, bool back, int out, int from = 1, size_t... lane>
SK_INLINE Vec<T> collect(const Vec<T>* x, Vec<T> found, std::index_sequence<lane...> lanes) {
  if constexpr (from == cols) {
    return found;
  } else {
    constexpr auto source = [](int to) {
      const auto [vector, place] = origin<T, cols, back>(out, to);
      return vector == from ? kLanes<T> + place : from == 1 && vector == 0 ? place : to;
    };
    return collect<T, cols, back, out, from + 1>(x, __builtin_shufflevector(found, x[from], source(int(lane))...), lanes);
  }
}
template <typename T, bool back, size_t... out>
SK_INLINE void turn_vectors(const Vec<T>* x, Vec<T>* to, std::index_sequence<out...>) {
  constexpr auto lanes = std::make_index_sequence<kLanes<T>>();
  ((to[out] = collect<T, sizeof...(out), back, int(out)>(x, x[0], lanes)), ...);
}
// Up to so many classes that takes fewer exchanges than whole tiles, of which most is empty.
constexpr int kFew = SK_VECTOR_BYTES == 64 ? 5 : 3;
// f(number), known when compiled
template <int number = 1, typename F>
SK_INLINE void with_few(int cols, F&& f) {
  if (cols == number) f(std::integral_constant<int, number>{});
  else if constexpr (number < kFew) with_few<number + 1>(cols, f);
}

// Some rows in memory, side by side, to vectors of one class each, and back. A last tile that is not full reaches into
// the rows behind its own; with `more` there are some behind the last as well. On the way back they are written later.
template <typename T, bool more>
void turn_in(const T* rows, int cols, Vec<T>* out) {
  constexpr int N = kLanes<T>;
  if (cols <= kFew)
    return with_few(cols, [&](auto few) SK_LAMBDA {
      Vec<T> x[few];
      for (int k = 0; k < few; ++k) x[k] = load(rows + k * N);
      turn_vectors<T, false>(x, out, std::make_index_sequence<few>());
    });
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
  if (cols <= kFew)
    return with_few(cols, [&](auto few) SK_LAMBDA {
      Vec<T> x[few], turned[few];
      for (int k = 0; k < few; ++k) x[k] = column(k);
      turn_vectors<T, true>(x, turned, std::make_index_sequence<few>());
      for (int k = 0; k < few; ++k) store(rows + k * N, turned[k]);
    });
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
// one before it. Logits are read as S, and gradients written so; what is not of that type or not contiguous goes through
// scratch, where S is T.
template <typename T, typename S, bool given>
class LongRows {
 public:
  explicit LongRows(const DivergenceJob& job)
      : job_(job),
        cols_(job.a.cols()),
        together_(int(std::clamp<int64_t>(kTogether / cols_, 1, kMaxTogether))),
        blocks_((cols_ + kBlock<T> - 1) / kBlock<T>),
        grad_a_{static_cast<char*>(job.grad_a), job.a.dtype()},
        grad_b_{static_cast<char*>(job.grad_b), job.b.dtype()},
        side_(std::min(cols_, kBlock<T>)),
        keeps_(!given && keeps(job.kind) && (job.grad_a || job.grad_b)),
        room_(new T[2 * (together_ + 1) * side_ + (waits_apart() || keeps_ ? 2 * together_ * cols_ : 0) +
                    (keeps_ ? 2 * cols_ : 0)]),
        done_(new Block<T>[together_ * blocks_]) {
    sum_ = job.inverse == 1 ? &LongRows::template sum<false> : &LongRows::template sum<true>;
    write_ = with_kind(job.kind, job.inverse != 1, [&](auto kind, auto scaled) { return &LongRows::template write<kind, scaled>; });
  }

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
          if (rows_[i].counts) (this->*sum_)(i, k, at[i]);
      }
      for (int i = 0; i < count; ++i)
        if (rows_[i].counts) settle(i);
      for (int i = 0; i < count; ++i) (this->*write_)(i, first + i, std::min(first + i + together_, end - 1));
      if (losses)
        for (int i = 0; i < count; ++i) losses[first + i] = rows_[i].loss;
    }
  }

 private:
  // Of these kinds the loss is summed while the gradients are written, as their sum is not wanted.
  static constexpr bool known(Kind kind) { return !given && known_sums(kind); }
  bool waits_apart() const { return job_.wait && (job_.in_place || !(grad_a_.direct() && grad_b_.direct())); }
  // Where a row's exponentials wait, if that is not where its gradients go, and what is kept of p and q: first those of a.
  T* room_apart(int i) const { return room_.get() + 2 * (together_ + 1) * side_ + 2 * i * cols_; }
  T* waiting(T* row, int64_t at) const { return job_.wait ? row + at : nullptr; }
  int64_t begin(int64_t block) const { return block * kBlock<T>; }
  int64_t size(int64_t block) const { return std::min(kBlock<T>, cols_ - begin(block)); }
  const S* columns(const Rows& x, const void* row, int64_t k, T* scratch) const {
    if constexpr (std::is_same_v<S, T>) return columns_in(x, row, begin(k), size(k), scratch);
    else return static_cast<const S*>(row) + begin(k);
  }
  const S* a(int i, int64_t k) const { return columns(job_.a, rows_[i].a, k, room_.get() + 2 * i * side_); }
  const S* b(int i, int64_t k) const { return columns(job_.b, rows_[i].b, k, room_.get() + (2 * i + 1) * side_); }
  // Where the gradients of some classes are written
  S* place(const Gradient<T>& grad, int64_t at, T* scratch) const {
    if constexpr (std::is_same_v<S, T>) return grad.data ? grad.at(at, scratch) : nullptr;
    else return grad.data ? reinterpret_cast<S*>(grad.data) + at : nullptr;
  }
  void round(const Gradient<T>& grad, const S* computed, int64_t at, int64_t cols) const {
    if constexpr (std::is_same_v<S, T>) grad.round(computed, at, cols);
  }

  void start(int i, int64_t index) {
    const T* const weight = static_cast<const T*>(job_.weight);
    const T* const upstream = static_cast<const T*>(job_.upstream);
    const T factor = weight ? weight[index] : T(1);
    const T scale = upstream ? upstream[job_.upstream_rows ? index : 0] : T(1);
    LongRow<T>& row = rows_[i];
    row = {job_.a.row(index), job_.b.row(index), T(job_.scale * job_.inverse) * scale * factor, job_.inverse};
    if (job_.wait) {
      T* const wait = waits_apart() ? room_apart(i) : nullptr;
      row.wait_a = job_.in_place ? wait : grad_a_.at(index * cols_, wait);
      row.wait_b = job_.in_place ? wait + cols_ : grad_b_.at(index * cols_, wait ? wait + cols_ : nullptr);
    }
    row.blocks = done_.get() + i * blocks_;
    row.counts = factor != T(0);
  }

  bool looks(int i, int64_t k) const { return !k || rows_[i].careful || rows_[i].surprises == kSurprises; }
  Survey<T> look(int i, int64_t k) {
    a_[i] = a(i, k), b_[i] = b(i, k);
    return looks(i, k) ? survey<T, given>(a_[i], b_[i], size(k), rows_[i].careful) : Survey<T>{};
  }

  template <bool scaled>
  void sum(int i, int64_t k, const Survey<T>& at) {
    LongRow<T>& row = rows_[i];
    Block<T>& block = row.blocks[k];
    if (row.careful && std::max(at.max_b, row.max_b) == -kInf<T>) {  // no class yet
      block.done = false;
      return;
    }
    const int64_t ahead = k + 1 < blocks_ ? kBlock<T> : 0, cols = size(k);
    Sums sums;
    const auto each = [&](int64_t j, int64_t cols, auto watch) SK_LAMBDA {
      T *const wait_a = waiting(row.wait_a, begin(k) + j), *const wait_b = waiting(row.wait_b, begin(k) + j);
      const auto go = [&](auto near, auto wait) SK_LAMBDA {
        return gather<T, given, near, wait, scaled, watch>(row, a_[i] + j, b_[i] + j, cols, ahead, wait_a, wait_b, sums);
      };
      const auto one = [&](auto near) SK_LAMBDA { return job_.wait ? go(near, std::true_type{}) : go(near, std::false_type{}); };
      return block.near ? one(std::true_type{}) : one(std::false_type{});
    };
    if (looks(i, k)) {
      advance(row, at, block);
      const int64_t step = row.careful ? 2 * kLanes<T> : cols;
      for (int64_t j = 0; j < cols; j += step) {
        each(j, std::min(step, cols - j), std::false_type{});
        row.add(sums, block.near);
      }
      return;
    }
    // It is taken to be like those before it, and done again if it is not.
    block = {row.max_a, row.max_b, row.near, true};
    const Survey<T> seen = each(0, cols, std::true_type{});
    const double rise = std::max(double(seen.max_a) - row.max_a, double(seen.max_b) - row.max_b);
    if (rise * row.inverse > kRise || (block.near && !row.within(seen.low, seen.high, row.centre()))) {
      ++row.surprises;
      advance(row, seen, block);
      each(0, cols, std::false_type{});
    } else {
      row.low = std::min(row.low, seen.low);
      row.high = std::max(row.high, seen.high);
    }
    row.add(sums, block.near);
  }

  // What follows from a row's sums. If they are not finite, first what kind of row it is.
  void settle(int i) {
    LongRow<T>& row = rows_[i];
    const Sums& of = row.sums;
    if (!((of.w + of.wd + of.x + of.xd) * 0 == 0)) {
      bool undefined = false, infinite = false, any_a = false, any_b = false;
      for (int64_t k = 0; k < blocks_; ++k) {
        const S *const a = this->a(i, k), *const b = this->b(i, k);
        for (int64_t j = 0; j < size(k); ++j) {
          const T two = number(b[j]), one = given ? two + number(a[j]) : number(a[j]);
          undefined |= !(one < kInf<T>) || !(two < kInf<T>);
          any_a |= one != -kInf<T>;
          any_b |= two != -kInf<T>;
          infinite |= infinite_without_p(job_.kind) && one == -kInf<T> && two != -kInf<T>;
          infinite |= infinite_without_q(job_.kind) && two == -kInf<T> && one != -kInf<T>;
        }
      }
      undefined |= !any_a || !any_b;
      if (undefined || infinite) {
        row.counts = false;
        row.loss = undefined ? kNan<T> : kInf<T>;
        return;
      }
      LongRow<T> again{row.a, row.b, row.scale, row.inverse, row.wait_a, row.wait_b, row.blocks, true, true};
      row = again;
      for (int64_t k = 0; k < blocks_; ++k) (this->*sum_)(i, k, look(i, k));
    }
    conclude(row);
    row.apart = std::min(row.kl_pq, row.kl_qp) >= kApart<T> && !job_.grad_both;  // in both sides' sum it would show
    if (job_.in_place && keeps_apart(job_.kind)) row.apart = false;  // what is kept takes the place of logits read again
  }

  // f(way, waiting, wait_a, wait_b) of a block whose logits are at hand, its exponentials too if they wait
  template <Kind kind, typename F>
  SK_INLINE void in_its_way(int i, int64_t k, F&& f) {
    const LongRow<T>& row = rows_[i];
    const Block<T>& block = row.blocks[k];
    const T *const wait_a = waiting(row.wait_a, begin(k)), *const wait_b = waiting(row.wait_b, begin(k));
    const auto go = [&]<Way way>(std::integral_constant<Way, way> its_way) SK_LAMBDA {
      const bool waits = job_.wait && block.done && (way == Way::near || !block.near);
      if (waits) f(its_way, std::true_type{}, wait_a, wait_b);
      else f(its_way, std::false_type{}, wait_a, wait_b);
    };
    if (row.near) return go(std::integral_constant<Way, Way::near>{});
    if constexpr (plain_where_apart(kind))
      if (row.apart) return go(std::integral_constant<Way, Way::apart>{});
    go(std::integral_constant<Way, Way::far>{});
  }

  // Adds up what its gradients are centred by, or tells it
  template <Kind kind>
  Totals sum_kind(int i, const Kept<T>& kept, int64_t next) {
    LongRow<T>& row = rows_[i];
    Totals totals = sums_of(kind, row.kl_pq, row.kl_qp);
    if constexpr (!known(kind)) {
      totals = {};
      for (int64_t k = 0; k < blocks_; ++k) {
        if (blocks_ > 1) a_[i] = a(i, k), b_[i] = b(i, k);
        in_its_way<kind>(i, k, [&](auto way, auto waits, const T* wait_a, const T* wait_b) SK_LAMBDA {
          finish_kind<T, given, kind, way, waits, true, false>(
              row, row.blocks[k], a_[i], b_[i], size(k), wait_a, wait_b, {}, kept.at(begin(k)), ahead(next, k),
              T(job_.beta), totals);
        });
      }
      if (loss_of_slopes(kind) && row.apart && !(totals.loss >= least_apart(kind) * job_.greatest)) {
        row.apart = false;  // classes that hardly count are apart alone
        if (kept.p)
          for (int64_t k = 0; k < blocks_; ++k) row.blocks[k].done = false;  // what waited has been written over
        return sum_kind<kind>(i, kept, next);
      }
    }
    return totals;
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
  template <Kind kind, bool scaled>
  void write(int i, int64_t index, int64_t next) {
    if (!rows_[i].counts) return fill(i, index);
    if constexpr (!given && keeps(kind))
      if (keeps_apart(kind) || !rows_[i].apart) return write_kept<kind>(i, index, next);
    write_blocks<kind, scaled>(i, index, next);
  }

  // A row with nothing to find out
  void fill(int i, int64_t index) {
    const T gradient = rows_[i].loss == T(0) ? T(0) : kNan<T>;
    const int64_t at = index * cols_;
    T* const both = static_cast<T*>(job_.grad_both);
    if (both) std::fill_n(both + at, cols_, gradient);
    for (int64_t j = 0; j < cols_; j += kLanes<T>) {
      const int n = int(std::min<int64_t>(kLanes<T>, cols_ - j));
      for (const Gradient<T>* grad : {&grad_a_, &grad_b_})
        if (S* const to = place(*grad, at + j, room_.get())) put(to, set1(gradient), n), round(*grad, to, at + j, n);
    }
  }

  template <Kind kind>
  void write_kept(int i, int64_t index, int64_t next) {
    LongRow<T>& row = rows_[i];
    const int64_t at = index * cols_;
    T* const p = room_apart(i);
    T* const slopes = room_apart(together_);
    const auto slope = [&](const Gradient<T>& grad, T* scratch) {
      return !keeps_ || !grad.data ? nullptr : grad.at(at, scratch);
    };
    const Kept<T> kept{p, p + cols_, slope(grad_a_, slopes), slope(grad_b_, slopes + cols_)};
    const Totals totals = sum_kind<kind>(i, kept, next);
    const T mean_a = T(totals.mean_a), mean_b = T(totals.mean_b), loss = T(totals.loss);
    const auto one = [&](const Gradient<T>& grad, const T* p, T* slope, T mean, T other) {
      if (!slope) return;
      S* const to = place(grad, at, slope);
      centre<kind>(row.scale, p, slope, cols_, mean, other, loss, to);
      round(grad, to, at, cols_);
    };
    one(grad_a_, kept.p, kept.slope_a, mean_a, mean_b);
    one(grad_b_, kept.q, kept.slope_b, mean_b, mean_a);
    row.loss = T(std::clamp(totals.loss, 0.0, job_.greatest));
  }

  template <Kind kind, bool scaled>
  void write_blocks(int i, int64_t index, int64_t next) {
    LongRow<T>& row = rows_[i];
    const bool one_by_one = kind == Kind::symmetric_kl && !(given && job_.grad_both);
    S* const both = static_cast<S*>(job_.grad_both);
    double loss = 0;
    Totals totals;
    if constexpr (given || kind != Kind::symmetric_kl)
      if (!one_by_one) totals = sum_kind<kind>(i, {}, index);
    for (int64_t k = 0; k < blocks_; ++k) {
      const int64_t at = index * cols_ + begin(k), cols = size(k);
      T* const buffer = room_.get() + 2 * together_ * side_;
      S* const to_a = place(grad_a_, at, buffer);
      S* const to_b = place(grad_b_, at, buffer + side_);
      if (blocks_ > 1) a_[i] = a(i, k), b_[i] = b(i, k);
      const Block<T>& block = row.blocks[k];
      const Wanted<S> want{job_.detach_targets, to_a, to_b, both ? both + at : nullptr};
      in_its_way<kind>(i, k, [&](auto way, auto waits, const T* wait_a, const T* wait_b) SK_LAMBDA {
        if constexpr (kind == Kind::symmetric_kl)
          if (one_by_one)
            loss += finish<T, given, way, waits, scaled>(row, block, a_[i], b_[i], cols, wait_a, wait_b, want, ahead(next, k));
        if constexpr (given || kind != Kind::symmetric_kl)
          if (!one_by_one && (known(kind) || want.grad_a || want.grad_b))
            finish_kind<T, given, kind, way, waits, known(kind), true>(
                row, block, a_[i], b_[i], cols, wait_a, wait_b, want, {}, ahead(next, k), T(job_.beta), totals);
      });
      round(grad_a_, to_a, at, cols);
      round(grad_b_, to_b, at, cols);
    }
    row.loss = one_by_one ? T(loss) : T(std::clamp(totals.loss, 0.0, job_.greatest));
  }

  const DivergenceJob& job_;
  const int64_t cols_;
  const int together_;
  const int64_t blocks_;
  const Gradient<T> grad_a_, grad_b_;
  const int64_t side_;  // elements of a block
  const bool keeps_;    // p, q and slopes, until all sums are known
  // For each row a block of either side, for all a block of either gradient; the exponentials of each; a row's slopes.
  const std::unique_ptr<T[]> room_;
  const std::unique_ptr<Block<T>[]> done_;
  void (LongRows::*sum_)(int, int64_t, const Survey<T>&);
  void (LongRows::*write_)(int, int64_t, int64_t);
  LongRow<T> rows_[kMaxTogether];
  const S *a_[kMaxTogether], *b_[kMaxTogether];
};

template <typename T>
void run_short(const DivergenceJob& job, int64_t begin, int64_t end) {
  constexpr int N = kLanes<T>;
  const int64_t cols = job.a.cols();
  const T* const weight = static_cast<const T*>(job.weight);
  const T* const upstream = static_cast<const T*>(job.upstream);
  T* const losses = static_cast<T*>(job.losses);
  const Gradient<T> grad_a{static_cast<char*>(job.grad_a), job.a.dtype()};
  const Gradient<T> grad_b{static_cast<char*>(job.grad_b), job.b.dtype()};
  const T* const row_upstream = job.upstream_rows ? upstream : nullptr;
  const T common = T(job.scale * job.inverse * (upstream && !row_upstream ? upstream[0] : T(1)));

  ShortRows<T> of(job);
  const auto run_kind = with_kind(job.kind, job.inverse != 1, [&](auto kind, auto scaled) { return &ShortRows<T>::template run<kind, scaled>; });
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
    (of.*run_kind)(int(cols));
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
    if (of.symmetric()) {
      write(grad_a, of.grad_a(scale, scale * own));
      write(grad_b, of.grad_b(scale, scale * own));
    } else {
      write(grad_a, of.grad_a(scale));
      write(grad_b, of.grad_b(scale));
    }
  }
}

template <typename T>
void run_rows(const DivergenceJob& job, int64_t begin, int64_t end) {
  const auto is_bf16 = [](const Rows& x) { return x.dtype() == ScalarType::BFloat16 && x.column_stride() == 1; };
  const auto run_long = [&](auto&& rows) { rows.run(begin, end); };
  if (job.difference) run_long(LongRows<T, T, true>(job));
  else if (!job.in_place && job.a.cols() <= kMaxTransposed) run_short<T>(job, begin, end);
  else if (!std::is_same_v<T, float> || !is_bf16(job.a) || !is_bf16(job.b)) run_long(LongRows<T, T, false>(job));
  else run_long(LongRows<T, std::conditional_t<std::is_same_v<T, float>, bf16, T>, false>(job));
}

void divergence_rows(const DivergenceJob& job, int64_t begin, int64_t end) {
  if (job.a.dtype() == ScalarType::Double) run_rows<double>(job, begin, end);
  else run_rows<float>(job, begin, end);
}

}  // namespace smart_kernels::SK_ISA
