// Copies out of replicas into clients' GPU memory: requests in, jobs for the devices' threads out, and back.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "engine/engine.h"
#include "gpu/device.h"
#include "rpc/loop.h"
#include "rpc/server.h"

namespace tensord::daemon {

using base::Result;

enum class GpuUse : uint8_t { automatic, off };

struct GpuOptions {
  GpuUse use = GpuUse::automatic;
  int64_t idle_ms = 0;  // as gpu::Device
};

// Lives on the loop's thread; all references must outlive it.
class DeviceCopies {
 public:
  DeviceCopies(engine::Engine& engine, rpc::Loop& loop, GpuOptions options)
      : engine_(engine), loop_(loop), options_(options) {}

  // `request` is a CopyToDevice. Code::unavailable, with the reason, where this daemon cannot use the device.
  void copy(rpc::Request request, std::function<void(Result<gpu::DeviceReport>)> done);
  void cancel(rpc::ConnectionId connection, uint64_t request);
  void forget(rpc::ConnectionId connection);

 private:
  Result<gpu::Device*> device(const gpu::Uuid& uuid);
  Result<std::unique_ptr<gpu::CopyJob>> make_job(rpc::Request& request, const engine::Replica& replica);

  engine::Engine& engine_;
  rpc::Loop& loop_;
  const GpuOptions options_;
  std::map<gpu::Uuid, std::unique_ptr<gpu::Device>> devices_;  // by use
};

}  // namespace tensord::daemon
