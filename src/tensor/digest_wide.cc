// Built once for each set of vector instructions (CMakeLists.txt): xxhash.h takes the widest that the compiler may use.
#include "tensor/digest_wide.h"

#if defined(__AVX512F__) && !defined(__clang__)
// GCC 12 takes the registers that its own intrinsics leave undefined on purpose for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define XXH_INLINE_ALL
#include <xxhash.h>

namespace tensord::tensor {

namespace {

static_assert(sizeof(XXH3_state_t) <= kHashStateBytes);

void whole(const void* bytes, size_t size_bytes, void* out) {
  XXH128_canonicalFromHash(static_cast<XXH128_canonical_t*>(out), XXH3_128bits(bytes, size_bytes));
}

void begin(void* state) { XXH3_128bits_reset(static_cast<XXH3_state_t*>(state)); }

void add(void* state, const void* bytes, size_t size_bytes) {
  XXH3_128bits_update(static_cast<XXH3_state_t*>(state), bytes, size_bytes);
}

void end(const void* state, void* out) {
  XXH128_canonicalFromHash(static_cast<XXH128_canonical_t*>(out),
                           XXH3_128bits_digest(static_cast<const XXH3_state_t*>(state)));
}

}  // namespace

#if defined(__AVX512F__)
const HashFunctions hash_avx512 = {whole, begin, add, end};
#elif defined(__AVX2__)
const HashFunctions hash_avx2 = {whole, begin, add, end};
#else
const HashFunctions hash_sse2 = {whole, begin, add, end};
#endif

}  // namespace tensord::tensor
