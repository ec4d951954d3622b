// How large the cache is that a core has to itself, as the machine says.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>

namespace smart_kernels {

inline int64_t second_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    if (found <= 0)  // as on arm64
      if (std::FILE* const file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index2/size", "r")) {
        long long kib = 0;
        if (std::fscanf(file, "%lldK", &kib) == 1) found = kib << 10;
        std::fclose(file);
      }
    return found > 0 ? found : int64_t(512) << 10;
  }();
  return bytes;
}

}  // namespace smart_kernels
