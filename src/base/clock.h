// Time as a parameter.
#pragma once

#include <atomic>
#include <cstdint>

namespace tensord::base {

// Thread safe. Nanoseconds of a monotonic clock; only differences mean anything.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual int64_t now_ns() const = 0;
};

class MonotonicClock final : public Clock {
 public:
  int64_t now_ns() const override;
};

// Stands still until told.
class FakeClock final : public Clock {
 public:
  int64_t now_ns() const override { return now_ns_.load(); }
  void advance_ns(int64_t ns) { now_ns_ += ns; }

 private:
  std::atomic<int64_t> now_ns_{0};
};

// The monotonic clock without an object, for measuring how long something took.
int64_t monotonic_ns();

}  // namespace tensord::base
