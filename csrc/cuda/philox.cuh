// Philox4x32-10 (Salmon et al. 2011): 128 random bits for a 64-bit counter.
#pragma once

#include <cstdint>

namespace smart_kernels {

__device__ __forceinline__ void philox(uint64_t seed, uint64_t counter, uint32_t (&words)[4]) {
  uint32_t a = static_cast<uint32_t>(counter), b = static_cast<uint32_t>(counter >> 32), c = 0, d = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53, a), low0 = 0xD2511F53 * a;
    const uint32_t high1 = __umulhi(0xCD9E8D57, c), low1 = 0xCD9E8D57 * c;
    a = high1 ^ b ^ key0;
    b = low1;
    c = high0 ^ d ^ key1;
    d = low0;
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  words[0] = a, words[1] = b, words[2] = c, words[3] = d;
}

}  // namespace smart_kernels
