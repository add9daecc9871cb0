// Memory of devices, as the engine needs it; who knows the devices does it.
#pragma once

#include <functional>
#include <string>

#include "engine/replica.h"

namespace tensord::engine {

inline constexpr uint64_t kDevicePageBytes = 2 << 20;  // memory of a device is made of these

class Devices {
 public:
  virtual ~Devices() = default;
  // All are called on the engine's thread, and so is `done`, later. A device is named by its UUID as text.

  // Code::exhausted where the device has no more.
  virtual void make(const std::string& device, uint64_t size_bytes, std::function<void(Result<Allocations>)> done) = 0;
  // Copies the image of `source` to `target` as it fills, and marks the blocks that are there, but not the end. Both stay
  // until `done` is called.
  virtual void fill(const Replica& source, Replica& target, std::function<void(Status)> done) = 0;
  // Whether one device can read the memory of another.
  virtual bool reaches(const std::string& device, const std::string& peer) = 0;
};

}  // namespace tensord::engine
