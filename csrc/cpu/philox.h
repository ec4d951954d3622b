// Philox4x32-10 (Salmon et al. 2011) on vectors of counters. Included once per instruction set, as vec.h is.

namespace smart_kernels::SK_ISA {

// 32 bits in each 64-bit lane; what stands in the upper halves does not count
typedef uint64_t Words __attribute__((vector_size(SK_VECTOR_BYTES)));

SK_INLINE Words multiply(Words x, uint32_t factor) {
#if SK_VECTOR_BYTES == 64 && defined(__x86_64__)
  return (Words)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
#elif SK_VECTOR_BYTES == 32 && defined(__x86_64__)
  return (Words)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#elif defined(__x86_64__)
  return (Words)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(factor));
#else
  return (x & 0xffffffff) * factor;
#endif
}

struct Random {
  Words words[4];
};

// 128 bits for each 64-bit counter
SK_INLINE Random philox(uint64_t seed, Words counter) {
  Words a = counter, b = counter >> 32, c{}, d{};
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Words product0 = multiply(a, 0xD2511F53), product1 = multiply(c, 0xCD9E8D57);
    a = (product1 >> 32) ^ b ^ key0;
    b = product1;
    c = (product0 >> 32) ^ d ^ key1;
    d = product0;
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return {{a, b, c, d}};
}

}  // namespace smart_kernels::SK_ISA
