// Compiles the kernel file named by SK_KERNEL once per instruction set, each in a namespace of its own
// (smart_kernels::avx512, ::avx2, ::baseline), so that one binary runs anywhere and fast where it can.
// With SK_ONLY defined, for vectors of so many bytes alone: a large kernel has a file for each, compiled side by side. A kernel file and vec.h have no include guard; what they include from outside stands here.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"
#include "cpu/rows.h"

#if defined(__x86_64__) && (!defined(SK_ONLY) || SK_ONLY == 64)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define SK_ISA avx512
#define SK_VECTOR_BYTES 64
#include "cpu/vec.h"
#include SK_KERNEL
#undef SK_ISA
#undef SK_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if defined(__x86_64__) && (!defined(SK_ONLY) || SK_ONLY == 32)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define SK_ISA avx2
#define SK_VECTOR_BYTES 32
#include "cpu/vec.h"
#include SK_KERNEL
#undef SK_ISA
#undef SK_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// SSE2 on x86-64, NEON on arm64
#if !defined(SK_ONLY) || SK_ONLY == 16
#define SK_ISA baseline
#define SK_VECTOR_BYTES 16
#include "cpu/vec.h"
#include SK_KERNEL
#undef SK_ISA
#undef SK_VECTOR_BYTES
#endif
