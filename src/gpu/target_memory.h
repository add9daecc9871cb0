// Device memory of a client, opened in this process.
#pragma once

#include <unistd.h>

#include <memory>
#include <string>
#include <utility>
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

// Memory on a device of this process that another process made, for reading: the hardware refuses writes. Thread safe.
class ReadMemory {
 public:
  // What is current on this thread stays so.
  static Result<std::shared_ptr<ReadMemory>> open(const Driver& driver, int device, const Target& memory);
  // Waits until the device is done with all that this process began. In a forked child it does nothing: the driver is
  // the parent's.
  ~ReadMemory();
  Address address() const { return held_->opened->address(); }

 private:
  struct Held {
    std::shared_ptr<Primary> primary;
    std::shared_ptr<OpenedMemory> opened;
  };
  std::unique_ptr<Held> held_ = std::make_unique<Held>();
  const pid_t process_ = ::getpid();
};

// New memory of a device, in descriptors of allocations that follow each other; it lasts as long as anybody has them. They
// are few and large: opening one elsewhere costs 0.1 ms. Code::exhausted where the device has no more.
Result<std::vector<std::pair<base::Fd, uint64_t>>> make_memory(const Driver& driver, int device, uint64_t size_bytes);

// A device of this process, "cuda:1" or its UUID: its number.
Result<int> find_device(const Driver& driver, const std::string& name);
// Its UUID as text. What is one already may be a device that this process does not see.
Result<std::string> device_uuid(const std::string& name);

// How many bytes there are from an address of device memory on, in its allocation.
Result<uint64_t> bytes_from(const Driver& driver, Address address);

}  // namespace tensord::gpu
