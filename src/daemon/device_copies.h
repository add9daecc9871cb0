// Copies out of replicas into memory of GPUs, clients' and that of replicas on them: requests in, jobs for the devices'
// threads out, and back.
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
class DeviceCopies final : public engine::Devices {
 public:
  DeviceCopies(engine::Engine& engine, rpc::Loop& loop, GpuOptions options)
      : engine_(engine), loop_(loop), options_(options) {}

  // `request` is a CopyToDevice. Code::unavailable, with the reason, where this daemon cannot use the device.
  void copy(rpc::Request request, std::function<void(Result<gpu::DeviceReport>)> done);
  void cancel(rpc::ConnectionId connection, uint64_t request);
  void forget(rpc::ConnectionId connection);

  void make(const std::string& device, uint64_t size_bytes,
            std::function<void(Result<engine::Allocations>)> done) override;
  void fill(const engine::Replica& source, engine::Replica& target, std::function<void(base::Status)> done) override;
  bool reaches(const std::string& device, const std::string& peer) override;

 private:
  struct Used {
    int number = 0;  // the driver's
    std::unique_ptr<gpu::Device> device;
  };
  Result<Used*> use(const std::string& device);
  Result<std::unique_ptr<gpu::CopyJob>> job_out_of(const engine::Replica& replica, const std::string& device);
  Result<std::unique_ptr<gpu::CopyJob>> client_job(rpc::Request& request, const engine::Replica& replica,
                                                   const std::string& device);

  engine::Engine& engine_;
  rpc::Loop& loop_;
  const GpuOptions options_;
  std::map<std::string, Used> devices_;  // by UUID
};

}  // namespace tensord::daemon
