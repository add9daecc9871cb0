// From verified requests to the engine, and back to replies.
#pragma once

#include <functional>

#include "base/clock.h"
#include "daemon/device_copies.h"
#include "daemon/report_json.h"
#include "engine/engine.h"
#include "rpc/server.h"

namespace tensord::daemon {

// Lives on the loop's thread; all references must outlive it.
class Requests {
 public:
  Requests(engine::Engine& engine, DeviceCopies& devices, const Config& config, size_t connection_count_max,
           std::function<void()> stop)
      : engine_(engine),
        devices_(devices),
        config_(config),
        connection_count_max_(connection_count_max),
        stop_(std::move(stop)) {}

  // Set once, before the first request: the server needs handle() to start.
  void reply_through(rpc::Server& server) { server_ = &server; }

  void handle(rpc::Request request);

 private:
  void open(rpc::Request request);
  void call(const rpc::Request& request);
  void used(const rpc::Request& request);
  void copy_to_device(rpc::Request request);
  base::Result<const engine::Replica*> selected(const protocol::Call& call) const;
  base::Result<std::string> answer(const protocol::Call& call);
  void reply_json(rpc::ConnectionId connection, uint64_t id, const base::Result<std::string>& json);

  engine::Engine& engine_;
  DeviceCopies& devices_;
  const Config& config_;
  const size_t connection_count_max_;
  const int64_t started_ns_ = base::monotonic_ns();
  const std::function<void()> stop_;
  rpc::Server* server_ = nullptr;
};

}  // namespace tensord::daemon
