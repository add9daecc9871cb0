// Device memory of this process, as another one can open it.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "gpu/copy_job.h"

namespace tensord::gpu {

// One device and the memory on it that was asked about.
struct ExportedDevice {
  Uuid uuid{};
  std::vector<Target> targets;
};

// Not thread safe. Descriptors go with it.
class Exports {
 public:
  explicit Exports(const Driver& driver) : driver_(driver) {}

  struct Place {
    int device = 0;
    uint32_t target = 0;
    uint64_t offset = 0;
  };
  // Where `size_bytes` of device memory lie. nullopt for what is no device memory. Code::unsupported for what cannot be
  // shared: of a pool, or made without a shareable handle.
  Result<std::optional<Place>> find(Address address, uint64_t size_bytes);

  std::map<int, ExportedDevice>& devices() { return devices_; }

 private:
  struct Stretch {
    Address end = 0;
    Place place;
  };
  Result<Target> export_ipc(Address begin, int device);
  Result<Target> export_fds(Address& begin, Address end);

  const Driver& driver_;
  std::map<Address, Stretch> stretches_;  // by their beginnings
  std::map<int, ExportedDevice> devices_;
};

}  // namespace tensord::gpu
