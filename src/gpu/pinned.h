// Host segments as devices read them: a second mapping of each, at addresses that stay while the segment is recycled,
// registered with the driver part by part, so that copying can begin while a segment fills.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/mutex.h"
#include "gpu/driver.h"
#include "memory/segment_pool.h"

namespace tensord::gpu {

// What is registered at once: 2 ms of the driver's time at 28-33 GB/s.
inline constexpr uint64_t kPinBytes = 64 << 20;

// The hold on what the driver keeps for this process on a device (527 MiB of its memory). Thread safe.
class Primary {
 public:
  // Made at the first call, which takes 0.1 to 0.3 s, and current on the calling thread.
  static Result<std::shared_ptr<Primary>> retain(const Driver& driver, int device);
  ~Primary();
  const Driver& driver() const { return driver_; }
  Handle handle() const { return handle_; }

 private:
  Primary(const Driver& driver, int device, Handle handle)
      : driver_(driver), device_(device), handle_(handle) {}
  const Driver& driver_;
  const int device_;
  const Handle handle_;
};

// One segment. Thread safe. Unregistered when the last reference goes. Registered with one device, whatever is current on
// the calling thread; all devices can copy out of it.
class Pinned final : public memory::Attachment {
 public:
  static Result<std::shared_ptr<Pinned>> map(std::shared_ptr<Primary> primary, std::byte* segment,
                                             uint64_t size_bytes);
  ~Pinned() override;

  uint64_t size_bytes() const { return mapped_.size_bytes(); }
  // Where a device reads the byte at `offset`, and the rest of its part; the part is registered where it is not.
  Result<const std::byte*> at(uint64_t offset);

 private:
  Pinned(std::shared_ptr<Primary> primary, memory::Mapped mapped);

  const std::shared_ptr<Primary> primary_;
  const memory::Mapped mapped_;
  base::Mutex mutex_;
  std::vector<bool> registered_ GUARDED_BY(mutex_);  // by part
};

}  // namespace tensord::gpu
