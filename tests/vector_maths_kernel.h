// The worst error of each function of vec.h over a range of floats, once per instruction set.

namespace smart_kernels::SK_ISA {

// Over the floats of the bits begin, begin + step, ... up to end: the largest |f(x) - exact(x)| in units in the last
// place of the exact result, and where it is. What is not finite must be met exactly.
template <typename F, typename G>
Worst worst_of(uint32_t begin, uint32_t end, uint32_t step, F&& f, G&& exact) {
  constexpr int N = kLanes<float>;
  Worst worst{0, 0};
  float x[N];
  for (uint64_t bits = begin; bits <= end;) {
    for (int i = 0; i < N; ++i) {
      const uint32_t lane = static_cast<uint32_t>(std::min<uint64_t>(bits, end));
      std::memcpy(&x[i], &lane, sizeof lane);
      bits += step;
    }
    const Vec<float> y = f(load(static_cast<const float*>(x)));
    for (int i = 0; i < N; ++i) {
      const double truth = exact(double(x[i])), error = std::abs(y[i] - truth);
      const bool same = std::isnan(truth) ? std::isnan(y[i]) : std::isinf(truth) && y[i] == truth;
      int exponent;
      std::frexp(truth, &exponent);
      const double units = std::ldexp(error, 24 - std::max(exponent, -125));
      const double wrong = same ? 0 : std::isnan(units) ? std::numeric_limits<double>::infinity() : units;
      if (wrong > worst.units) worst = {wrong, x[i]};
    }
  }
  return worst;
}

Worst worst(int function, uint32_t begin, uint32_t end, uint32_t step) {
  const auto over = [&](auto&& f, auto&& exact) { return worst_of(begin, end, step, f, exact); };
  using V = Vec<float>;
  switch (function) {
    case 0: return over([](V x) { return expm1_small<float>(x); }, [](double x) { return std::expm1(x); });
    case 1: return over([](V x) { return exp_small<float>(x); }, [](double x) { return std::exp(x); });
    case 2: return over([](V x) { return exponential<float>(x); }, [](double x) { return std::exp(x); });
    case 3: return over([](V x) { return log_positive<float>(x); }, [](double x) { return std::log(x); });
    case 4: return over([](V x) { return log1p<float>(x); }, [](double x) { return std::log1p(x); });
    case 5: return over([](V x) { return square_root<float>(x); }, [](double x) { return std::sqrt(x); });
    default: return over([](V x) { return reciprocal<float>(x); }, [](double x) { return 1 / x; });
  }
}

}  // namespace smart_kernels::SK_ISA
