// Time, for deadlines and for how long something took.
#pragma once

#include <time.h>

#include <cstdint>

namespace tensord::base {

inline constexpr int64_t kNsPerMs = 1'000'000;

// Thread safe. Nanoseconds of a monotonic clock; only differences mean anything.
inline int64_t monotonic_ns() {
  timespec now;
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

}  // namespace tensord::base
