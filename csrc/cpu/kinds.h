// The kinds of divergences: of each one function, as in reference.py, and its row in the tables. What is for vectors is
// included once per instruction set by divergence_kernel.h.
#ifndef SMART_KERNELS_KINDS
#define SMART_KERNELS_KINDS

#include <cmath>
#include <cstdint>
#include <limits>

namespace smart_kernels {

enum class Kind : int64_t { symmetric_kl, kl, reverse_kl, js, hellinger, total_variation };  // as in reference.py
constexpr Kind kLastKind = Kind::total_variation;

// What a divergence cannot exceed: its value for distributions that have no class in common
inline double greatest(Kind kind, double beta) {
  switch (kind) {
    case Kind::js: return -beta * std::log(beta) - (1 - beta) * std::log1p(-beta);
    case Kind::hellinger:
    case Kind::total_variation: return 1;
    default: return std::numeric_limits<double>::infinity();
  }
}

// Whether a class that is masked in the input alone makes a divergence infinite; in the target alone.
constexpr bool infinite_without_p(Kind kind) { return kind == Kind::symmetric_kl || kind == Kind::kl; }
constexpr bool infinite_without_q(Kind kind) { return kind == Kind::symmetric_kl || kind == Kind::reverse_kl; }

// Sums over a row: of a divergence, and of what its gradients are centred by
struct Totals {
  double loss = 0, mean_a = 0, mean_b = 0;
};

// Whether the latter follow from KL(p||q) and KL(q||p), so that the loss is summed while the gradients are written.
constexpr bool known_sums(Kind kind) { return kind <= Kind::reverse_kl; }
inline Totals sums_of(Kind kind, double kl_pq, double kl_qp) {
  return {0, kind == Kind::kl ? 0 : kl_pq, kind == Kind::reverse_kl ? 0 : kl_qp};
}

// Of the others, whether it takes longer to find a class's slopes anew than to keep them until these sums are known; also
// where p - q is a plain difference
constexpr bool keeps(Kind kind) { return kind == Kind::js || kind == Kind::hellinger; }
constexpr bool keeps_apart(Kind kind) { return kind == Kind::js; }

// Whether p - q of a class may be their plain difference where both divergences are large: not where it alone is a gradient
constexpr bool plain_where_apart(Kind kind) { return kind != Kind::kl && kind != Kind::reverse_kl; }

// Whether the loss is then taken from the slopes' sums, as q f = p f' + q g: terms of either sign, of which a small loss
// would have few digits. So the loss must not be below this share of what it is at most.
constexpr bool loss_of_slopes(Kind kind) { return kind == Kind::js || kind == Kind::hellinger; }
constexpr double least_apart(Kind kind) { return kind == Kind::js ? 1.0 / 32 : 1.0 / 8; }

}  // namespace smart_kernels

#endif
#ifdef SK_ISA

namespace smart_kernels::SK_ISA {

// How p - q is had: from q alone; from q where |t| is small; as it stands, where both divergences are so large that
// the rounding of p and q does not show in a gradient.
enum class Way { near, far, apart };

// Some classes: x = p - q and t = log(p / q), with digits that p and q alone have not
template <typename T>
struct Classes {
  Vec<T> p, q, x, t;
};

// Of each class its share of the loss, q f(r) with r = p / q; p f'(r); q g(r) with g = f - r f'. The gradients are
// p (f' - sum p f') and q (g - sum q g).
template <typename T>
struct Parts {
  Vec<T> term, slope_a, slope_b;
};

// x - q log((q + x) / q) >= 0, given the logarithm: q (expm1(log) - log), whose first terms cancel where it is small
template <typename T>
SK_INLINE Vec<T> excess(Vec<T> q, Vec<T> x, Vec<T> log) {
  const Mask<T> near = (vabs<T>(log) <= T(0.5)) & (q != Vec<T>{});
  return near ? q * excess_small<T>(log) : x - q * log;
}

// KL(p||q) + KL(q||p)
template <typename T>
SK_INLINE Parts<T> symmetric_kl(const Classes<T>& of, T) {
  return {of.x * of.t, of.p * of.t + of.x, -(of.q * of.t) - of.x};
}

// KL(q||p)
template <typename T>
SK_INLINE Parts<T> kl(const Classes<T>& of, T) {
  return {excess<T>(of.q, of.x, of.t), of.x, -(of.q * of.t)};
}

// KL(p||q)
template <typename T>
SK_INLINE Parts<T> reverse_kl(const Classes<T>& of, T) {
  return {excess<T>(of.p, -of.x, -of.t), of.p * of.t, -of.x};
}

// beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p. Of log(m / q) and log(m / p), which differ by t and have
// opposite signs, the smaller by beta is found; the other where that one's class has next to no mass.
template <typename T>
SK_INLINE Parts<T> js(const Classes<T>& of, T beta) {
  const T rest = T(1) - beta;
  const Vec<T> m = beta * of.q + rest * of.p, more = rest * of.x, less = -beta * of.x;  // m - q, m - p
  const Vec<T> least = set1(std::numeric_limits<T>::min());
  const bool rather_q = beta >= T(0.5);
  const Mask<T> by_q = rather_q ? (of.t <= T(8)) & (of.q >= least) : (of.t < T(-8)) | (of.p < least);
  const Vec<T> base = by_q ? of.q : of.p, change = by_q ? more : less, over = reciprocal<T>(vmax(base, least));
  const Vec<T> log = log_positive<T>(m * over, change * over, vabs<T>(change) <= T(0.25) * base);
  const Vec<T> log_mq = by_q ? log : log + of.t, log_mp = by_q ? log - of.t : log;
  const Vec<T> term = beta * excess<T>(of.q, more, log_mq) + rest * excess<T>(of.p, less, log_mp);
  return {term, -rest * (of.p * log_mp), -beta * (of.q * log_mq)};
}

// 1/2 sum (sqrt p - sqrt q)^2, by h = expm1(t / 2) where |t| <= 1, unless the rows are so far apart that this does not show
template <typename T, Way way>
SK_INLINE Parts<T> hellinger(const Classes<T>& of, T) {
  constexpr T large = std::is_same_v<T, float> ? T(0x1p60) : T(0x1p500);  // with it no product underflows
  const Vec<T> root = square_root<T>((of.p * large) * (of.q * large)) * (1 / large);
  Vec<T> from_p = of.p - root, from_q = root - of.q, term = from_p - from_q;
  if constexpr (way != Way::apart) {
    const Mask<T> close = way == Way::near ? ~Mask<T>{} : vabs<T>(of.t) <= T(1);
    const Vec<T> h = expm1_small<T>(T(0.5) * of.t), qh = of.q * h;
    from_p = close ? qh + qh * h : from_p;
    from_q = close ? qh : from_q;
    term = close ? qh * h : term;
  }
  return {T(0.5) * term, T(0.5) * from_p, T(-0.5) * from_q};
}

// 1/2 sum |p - q|; f' and g but for a constant, so that each sum is that of a side's smaller part (`centred`)
template <typename T>
SK_INLINE Parts<T> total_variation(const Classes<T>& of, T) {
  const Vec<T> half = set1(T(0.5)), sign = of.x > Vec<T>{} ? half : of.x < Vec<T>{} ? -half : Vec<T>{};
  return {half * vabs<T>(of.x), of.p * (sign - half), -of.q * (sign + half)};
}

template <Kind kind, typename T, Way way = Way::far>
SK_INLINE Parts<T> parts(const Classes<T>& of, T beta) {
  if constexpr (kind == Kind::symmetric_kl) return symmetric_kl<T>(of, beta);
  else if constexpr (kind == Kind::kl) return kl<T>(of, beta);
  else if constexpr (kind == Kind::reverse_kl) return reverse_kl<T>(of, beta);
  else if constexpr (kind == Kind::js) return js<T>(of, beta);
  else if constexpr (kind == Kind::hellinger) return hellinger<T, way>(of, beta);
  else return total_variation<T>(of, beta);
}

// The sum of both sides' gradients, of second order where they are of first; see reference.py.
template <Kind kind, typename T>
SK_INLINE Vec<T> of_both(const Classes<T>& of, Vec<T> term, T mean_a, T loss) {
  return term - of.q * loss - of.x * (kind == Kind::total_variation ? mean_a + T(0.5) : mean_a);
}

// p (f' - sum p f') of a side, given both sides' sums, for a row or for one in each lane; see reference.py.
template <Kind kind, typename T, typename Sum>
SK_INLINE Vec<T> centred(Vec<T> p, Vec<T> slope, Sum mean, Sum other_mean, Sum loss) {
  if constexpr (kind == Kind::total_variation) {
    const Sum other = loss - other_mean, both = T(0.5) * (mean + other);
    return -p * (slope == T(-0.5) * p ? both + Vec<T>{} : slope == Vec<T>{} ? mean + Vec<T>{} : other + Vec<T>{});
  } else {
    return slope - p * mean;
  }
}

// Both sides' gradients of a row's classes, given its sums, times `scale`
template <Kind kind, typename T>
class Gradients {
 public:
  Gradients(const Totals& of, T scale) : scale_(scale), mean_a_(T(of.mean_a)), mean_b_(T(of.mean_b)), loss_(T(of.loss)) {}
  SK_INLINE Vec<T> a(const Classes<T>& of, const Parts<T>& part) const {
    if constexpr (kind == Kind::total_variation) return of.p * by_sign(of.x, mean_a_, loss_ - mean_b_);
    else return scale_ * centred<kind, T>(of.p, part.slope_a, mean_a_, mean_b_, loss_);
  }
  SK_INLINE Vec<T> b(const Classes<T>& of, const Parts<T>& part) const {
    if constexpr (kind == Kind::total_variation) return of.q * by_sign(of.x, loss_ - mean_a_, mean_b_);
    else return scale_ * centred<kind, T>(of.q, part.slope_b, mean_b_, mean_a_, loss_);
  }
  SK_INLINE Vec<T> both(const Classes<T>& of, const Parts<T>& part) const {
    return scale_ * of_both<kind, T>(of, part.term, mean_a_, loss_);
  }

 private:
  SK_INLINE Vec<T> by_sign(Vec<T> x, T more, T less) const {
    const Vec<T> positive = set1(-scale_ * more), negative = set1(-scale_ * less), zero = T(0.5) * (positive + negative);
    return x > Vec<T>{} ? positive : x < Vec<T>{} ? negative : zero;
  }
  const T scale_, mean_a_, mean_b_, loss_;
};

// f(kind, scaled), both known when compiled: the symmetric KL alone has a version of its own for a temperature of 1.
template <typename F>
SK_INLINE auto with_kind(Kind kind, bool scaled, F&& f) {
  const auto any = [&]<Kind kind>(std::integral_constant<Kind, kind> it) SK_LAMBDA { return f(it, std::true_type{}); };
  switch (kind) {
    case Kind::kl: return any(std::integral_constant<Kind, Kind::kl>{});
    case Kind::reverse_kl: return any(std::integral_constant<Kind, Kind::reverse_kl>{});
    case Kind::js: return any(std::integral_constant<Kind, Kind::js>{});
    case Kind::hellinger: return any(std::integral_constant<Kind, Kind::hellinger>{});
    case Kind::total_variation: return any(std::integral_constant<Kind, Kind::total_variation>{});
    default: break;
  }
  const std::integral_constant<Kind, Kind::symmetric_kl> symmetric{};
  return scaled ? f(symmetric, std::true_type{}) : f(symmetric, std::false_type{});
}

}  // namespace smart_kernels::SK_ISA

#endif
