// A library for test_vector_maths.py.
#include <cstdint>
#include <string_view>

namespace smart_kernels {
struct Worst {
  double units, at;
};
}  // namespace smart_kernels

#define SK_KERNEL "vector_maths_kernel.h"
#include "cpu/foreach_isa.h"

extern "C" void worst(int function, uint32_t begin, uint32_t end, uint32_t step, double* result) {
  const smart_kernels::Worst found = [&] {
    using namespace smart_kernels;
    return SK_DISPATCH(worst)(function, begin, end, step);
  }();
  result[0] = found.units;
  result[1] = found.at;
}

extern "C" const char* isa() { return smart_kernels::isa_name(); }
