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
#define XXH_VECTOR XXH_AVX512
#define TENSORD_HASH_FUNCTIONS hash_avx512
#define TENSORD_ZERO_UPPER _mm256_zeroupper
#include "tensor/digest_wide_body.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
