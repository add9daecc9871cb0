// Conversions between floating-point types.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor/dtype.h"

namespace tensord::memory {

// Which instructions may be used; the results are the same. Streamed: the fastest, past the caches where the target lies
// for it; base::end_streaming() must follow.
enum class CastPath : uint8_t { fastest, streamed, portable };

// Converts `count` elements. Round to nearest even, subnormals included; overflow becomes infinity; NaN stays NaN and
// turns quiet. Only pairs of tensor::can_cast (CHECK). Any alignment; source and target must not overlap.
// Thread safe.
void cast_elements(tensor::Dtype source_dtype, const std::byte* source, tensor::Dtype target_dtype, std::byte* target,
                   uint64_t count, CastPath path = CastPath::fastest);

}  // namespace tensord::memory
