// The instruction set that the CPU kernels use, chosen once when the library is first called.
#pragma once

#include <cstdlib>
#include <cstring>

namespace smart_kernels {

enum class Isa { baseline, avx2, avx512 };

// SMART_KERNELS_ISA=baseline|avx2|avx512 lowers the choice, for tests; it never raises it above what the CPU has.
inline Isa isa() {
  static const Isa chosen = [] {
    Isa best = Isa::baseline;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      best = Isa::avx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        best = Isa::avx512;
    }
#endif
    const char* wanted = std::getenv("SMART_KERNELS_ISA");
    if (wanted && !std::strcmp(wanted, "baseline")) return Isa::baseline;
    if (wanted && !std::strcmp(wanted, "avx2") && best == Isa::avx512) return Isa::avx2;
    return best;
  }();
  return chosen;
}

inline const char* isa_name() {
  switch (isa()) {
    case Isa::avx512: return "AVX-512";
    case Isa::avx2: return "AVX2";
    default: return "baseline";
  }
}

}  // namespace smart_kernels

// The variant of a kernel function for this machine: SK_DISPATCH(function)(arguments...)
#if defined(__x86_64__)
#define SK_DISPATCH(function)                                                    \
  (::smart_kernels::isa() == ::smart_kernels::Isa::avx512 ? &avx512::function    \
   : ::smart_kernels::isa() == ::smart_kernels::Isa::avx2 ? &avx2::function      \
                                                          : &baseline::function)
#else
#define SK_DISPATCH(function) (&baseline::function)
#endif
