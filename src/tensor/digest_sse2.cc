#include <stdlib.h>
#include <string.h>

#include "tensor/digest_wide.h"

#define XXH_VECTOR XXH_SSE2
#define TENSORD_HASH_FUNCTIONS hash_sse2
#define TENSORD_ZERO_UPPER()
#include "tensor/digest_wide_body.h"
