// The functions of digest_wide.h, to be compiled once for each set of instructions: the file that includes this has
// chosen XXH_VECTOR, TENSORD_HASH_FUNCTIONS (the name) and TENSORD_ZERO_UPPER (what ends wide code).
#define XXH_INLINE_ALL
#include <xxhash.h>

namespace tensord::tensor {

namespace {

static_assert(sizeof(XXH3_state_t) <= kHashStateBytes);

// GCC leaves vzeroupper out under a target pragma; without it SSE code that the thread runs later takes three times
// as long.
void whole(const void* bytes, size_t size_bytes, void* out) {
  XXH128_canonicalFromHash(static_cast<XXH128_canonical_t*>(out), XXH3_128bits(bytes, size_bytes));
  TENSORD_ZERO_UPPER();
}

void begin(void* state) { XXH3_128bits_reset(static_cast<XXH3_state_t*>(state)); }

void add(void* state, const void* bytes, size_t size_bytes) {
  XXH3_128bits_update(static_cast<XXH3_state_t*>(state), bytes, size_bytes);
  TENSORD_ZERO_UPPER();
}

void end(const void* state, void* out) {
  XXH128_canonicalFromHash(static_cast<XXH128_canonical_t*>(out),
                           XXH3_128bits_digest(static_cast<const XXH3_state_t*>(state)));
  TENSORD_ZERO_UPPER();
}

}  // namespace

const HashFunctions TENSORD_HASH_FUNCTIONS = {whole, begin, add, end};

}  // namespace tensord::tensor
