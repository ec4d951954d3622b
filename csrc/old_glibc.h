// Included before every file, so that what is built on a new system also loads on one with the glibc 2.28 that torch
// itself asks for: what newer ones have in another version is asked for in the version that all have.
#pragma once

#include <features.h>

#if defined(__GLIBC__)

#if defined(__x86_64__)
#define SK_OLDEST "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define SK_OLDEST "GLIBC_2.17"
#endif
#if defined(SK_OLDEST)
// In 2.29 a version without the wrapper that sets errno, which nothing here reads
__asm__(".symver exp, exp@" SK_OLDEST);
__asm__(".symver exp2, exp2@" SK_OLDEST);
__asm__(".symver log, log@" SK_OLDEST);
__asm__(".symver log2, log2@" SK_OLDEST);
__asm__(".symver pow, pow@" SK_OLDEST);
// In 2.34 moved here from libdl; torch's headers look with it for what is newer than the oldest torch
__asm__(".symver dlsym, dlsym@" SK_OLDEST);
#endif

// Since 2.32; shared_ptr reads it, to count without atomic operations where there is one thread. Here there are several.
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}

#endif
