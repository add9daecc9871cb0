// Copies into the caller's GPU memory: which records of a plan a copy engine can run, and the requests that make the daemon
// run them.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "client/connection.h"
#include "gpu/exports.h"
#include "tensor/plan.h"

namespace tensord::client {

// Rows of plain bytes, neither too short nor too far apart, and not too many loops around them.
bool can_copy_to_device(const tensor::Copy2D& record);

// One for each device: a connection is busy until all that it asked for is copied. Thread safe.
class DeviceConnections {
 public:
  explicit DeviceConnections(Autostart autostart) : autostart_(autostart) {}
  Result<Connection*> get(int device);

 private:
  const Autostart autostart_;
  base::Mutex mutex_;
  std::map<int, std::unique_ptr<Connection>> connections_ GUARDED_BY(mutex_);
};

// All records of `plan` must be such, and their targets device memory that `exports` can find from `target` on. Devices
// work at the same time. Returns when nothing is under way any more, whatever the result; errors say whether anything may
// have been written. Code::cancelled as memory::CopyOptions. Devices that the daemon cannot use, and wrote nothing to, are
// told in `refused` while the others are copied to; nullptr: their error is that of all. Times are the longest of any device.
Result<protocol::CopiedToDeviceT> copy_to_devices(const tensor::CopyPlan& plan, gpu::Address target,
                                                  gpu::Exports& exports, uint64_t replica,
                                                  DeviceConnections& connections, const int32_t* cancel,
                                                  std::map<int, base::Error>* refused);

}  // namespace tensord::client
