// The arithmetic of the exponential moving average, the same on vectors of a CPU and on a GPU's scalars, so that both
// give the same bits. Included inside a namespace that has SK_INLINE and
//
//   multiply, add, subtract   rounded to nearest, never contracted
//   fused(a, b, c)            a b + c, rounded once
//   magnitude(a), select(mask, a, b), all_less(a, b), all_at_most(a, b)
//
// No include guard: a CPU kernel file is compiled once per instruction set.

// decay and 1 - decay to twice the precision of the arithmetic
template <typename S>
struct Coefficients {
  S decay, decay_low, weight, weight_low;
};

SK_INLINE Coefficients<double> double_coefficients(double decay) {
  const double weight = 1 - decay;
  return {decay, 0, weight, (1 - weight) - decay};
}
SK_INLINE Coefficients<float> float_coefficients(double decay) {
  const double weight = 1 - decay;
  const float decay_high = static_cast<float>(decay), weight_high = static_cast<float>(weight);
  return {decay_high, static_cast<float>(decay - decay_high), weight_high, static_cast<float>(weight - weight_high)};
}

// decay e + (1 - decay) p, which does not overflow: both products and their sum with what rounding drops from each,
// added at the end. Half a unit in the last place of the result.
template <typename V, typename S>
SK_INLINE V weighted_sum(V e, V p, const Coefficients<S>& k) {
  const V kept = multiply(e, k.decay), gained = multiply(p, k.weight);
  const V sum = add(kept, gained), share = subtract(sum, kept);
  const V sum_low = add(subtract(kept, subtract(sum, share)), subtract(gained, share));
  const V products_low = add(fused(e, k.decay, -kept), fused(p, k.weight, -gained));
  const V low = add(fused(p, k.weight_low, fused(e, k.decay_low, products_low)), sum_low);
  return select(low == low, add(sum, low), fused(subtract(p, e), k.weight, e));  // e or p is infinite or NaN
}

// e + (1 - decay)(p - e), off by less than 0.8 units in the last place of the result. Where e moves by up to an eighth
// of itself, the roundings of the weight and of the distance are an eighth of what they are elsewhere: too little to
// keep. To a narrow shadow they matter only where the step and e cancel to a 512th, and where the distance overflows.
template <typename V, typename S>
SK_INLINE V plain_move(V e, V p, const Coefficients<S>& k) {
  return fused(subtract(p, e), k.weight, e);
}
// That will do where the first is less than the second, or the same if not narrow.
template <bool kNarrow, typename V, typename S>
SK_INLINE V step_size(V e, V p, const Coefficients<S>& k) {
  return multiply(magnitude(subtract(p, e)), kNarrow ? k.weight / 512 : k.weight * 8);
}
template <bool kNarrow, typename V, typename S>
SK_INLINE V step_bound(V e, V p, const Coefficients<S>& k) {
  return magnitude(kNarrow ? plain_move(e, p, k) : e);
}
template <bool kNarrow, typename V, typename S>
SK_INLINE bool moves_little(V e, V p, const Coefficients<S>& k) {
  const V step = step_size<kNarrow>(e, p, k), bound = step_bound<kNarrow>(e, p, k);
  if constexpr (kNarrow) return all_less(step, bound);
  else return all_at_most(step, bound);
}
template <bool kNarrow, typename V, typename S>
SK_INLINE V any_move(V e, V p, const Coefficients<S>& k) {
  const V step = step_size<kNarrow>(e, p, k), bound = step_bound<kNarrow>(e, p, k);
  const V moved = plain_move(e, p, k), exact = weighted_sum(e, p, k);
  if constexpr (kNarrow) return select(step < bound, moved, exact);
  else return select(step <= bound, moved, exact);
}
template <bool kNarrow, typename V, typename S>
SK_INLINE V move_towards(V e, V p, const Coefficients<S>& k) {
  return moves_little<kNarrow>(e, p, k) ? plain_move(e, p, k) : any_move<kNarrow>(e, p, k);
}

// What a narrow format drops of a float's mantissa, its smallest exponent (as a float's is stored), its largest number
struct Bfloat16 {
  static constexpr uint32_t dropped = 16, smallest = 1;
  static constexpr float largest = 0x1.fep127f;
};
struct Float16 {
  static constexpr uint32_t dropped = 13, smallest = 113;
  static constexpr float largest = 65504.0f;
};

// The bits of |x| <= largest in the narrow format, rounded up or down with the probabilities that make the mean |x|: it
// is a whole number of last places and a remainder, to which a random number is added that carries with just that
// probability. Below the smallest exponent the last place is fixed, so that more bits are dropped.
template <typename Format, typename U>
SK_INLINE U stochastic_magnitude(U magnitude, U random) {
  const U one = U{} + 1, most = U{} + 31, smallest = U{} + Format::smallest;
  const U stored = magnitude >> 23, exponent = select(stored > 0, stored, one);
  const U mantissa = select(stored > 0, (magnitude & 0x7fffff) | 0x800000, magnitude);
  const U missing = select(exponent < smallest, smallest - exponent, U{});
  const U dropped = missing + Format::dropped, shift = select(dropped < most, dropped, most), excess = dropped - shift;
  const U units = ((mantissa >> select(excess < most, excess, most)) + (random & ((one << shift) - 1))) >> shift;
  return ((exponent + missing - Format::smallest) << (23 - Format::dropped)) + units;
}
