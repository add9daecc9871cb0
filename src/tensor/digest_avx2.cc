#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#include "tensor/digest_wide.h"

#ifdef __clang__  // has no "GCC target"
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define XXH_VECTOR XXH_AVX2
#define TENSORD_HASH_FUNCTIONS hash_avx2
#define TENSORD_ZERO_UPPER _mm256_zeroupper
#include "tensor/digest_wide_body.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
