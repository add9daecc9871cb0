// Host segments as devices read them: a second mapping of each, at addresses that stay while the segment is recycled,
// registered with the driver part by part, so that copying can begin while a segment fills.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
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
  Primary(const Driver& driver, int device, Handle handle) : driver_(driver), device_(device), handle_(handle) {}
  const Driver& driver_;
  const int device_;
  const Handle handle_;
};

// One segment. Thread safe. Unregistered when the last reference goes. Registered with one device, whatever is current on
// the calling thread; all devices can copy out of it.
class Pinned final : public memory::Attachment {
 public:
  static Result<std::shared_ptr<Pinned>> map(std::shared_ptr<Primary> primary, std::byte* segment, uint64_t size_bytes);
  ~Pinned() override;

  uint64_t size_bytes() const { return mapped_.size_bytes(); }
  // Where a device reads the byte at `offset`, and the rest of its part; the part is registered where it is not.
  Result<const std::byte*> at(uint64_t offset);
  bool is_registered(uint64_t offset);

 private:
  enum class Part : uint8_t { plain, busy, registered };
  Pinned(std::shared_ptr<Primary> primary, memory::Mapped mapped);

  const std::shared_ptr<Primary> primary_;
  const memory::Mapped mapped_;
  base::Mutex mutex_;
  std::condition_variable settled_;
  std::vector<Part> parts_ GUARDED_BY(mutex_);
};

// Registers memory before it is read, on several threads: one does less than half of what the bus takes.
class PinAhead {
 public:
  // `ready` says whether the bytes of a part are there (before that they would be touched twice); called from the threads.
  struct Stretch {
    std::shared_ptr<Pinned> segment;
    uint64_t offset = 0;
    std::function<bool()> ready;
  };
  explicit PinAhead(std::vector<Stretch> stretches);
  ~PinAhead();

 private:
  void run();

  const std::vector<Stretch> stretches_;
  std::atomic<size_t> next_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> threads_;  // last: they use all the others
};

}  // namespace tensord::gpu
