#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#include "tensor/digest_wide.h"

#ifdef __clang__  // has no "GCC target"
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC target("avx512f")
// GCC 12 takes the registers that its own intrinsics leave undefined on purpose for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define XXH_INLINE_ALL
#define XXH_VECTOR XXH_AVX512
#include <xxhash.h>

namespace tensord::tensor {

void hash_avx512(const void* bytes, size_t size_bytes, void* out) {
  XXH128_canonicalFromHash(static_cast<XXH128_canonical_t*>(out), XXH3_128bits(bytes, size_bytes));
  // GCC leaves this out under a target pragma; without it SSE code that the thread runs later takes three
  // times as long.
  _mm256_zeroupper();
}

}  // namespace tensord::tensor

#ifdef __clang__
#pragma clang attribute pop
#endif
