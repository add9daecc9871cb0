// Device memory of a client, opened in this process.
#pragma once

#include <memory>
#include <vector>

#include "gpu/copy_job.h"
#include "gpu/pinned.h"

namespace tensord::gpu {

// Closed when it goes, on a thread where the device is current.
class OpenedMemory {
 public:
  // Code::invalid_argument when what was exported is smaller than the client says.
  static Result<std::shared_ptr<OpenedMemory>> open(const Driver& driver, int device, const Target& target,
                                                    int access = kReadWrite);
  ~OpenedMemory();
  OpenedMemory(const OpenedMemory&) = delete;
  OpenedMemory& operator=(const OpenedMemory&) = delete;
  Address address() const { return address_; }

 private:
  explicit OpenedMemory(const Driver& driver) : driver_(driver) {}
  Status open_ipc(const Target& target);
  Status map(int device, const Target& target, int access);

  const Driver& driver_;
  Address address_ = 0;
  bool ipc_ = false;
  uint64_t reserved_bytes_ = 0;
  std::vector<uint64_t> mapped_;  // sizes, one after another from address_ on
};

// How many bytes there are from an address of device memory on, in its allocation.
Result<uint64_t> bytes_from(const Driver& driver, Address address);

}  // namespace tensord::gpu
