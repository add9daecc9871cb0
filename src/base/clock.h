// Time, for deadlines and for how long something took.
#pragma once

#include <cstdint>

namespace tensord::base {

// Thread safe. Nanoseconds of a monotonic clock; only differences mean anything.
int64_t monotonic_ns();

}  // namespace tensord::base
