// From verified requests to the engine, and back to replies.
#pragma once

#include <functional>

#include "daemon/device_copies.h"
#include "daemon/report_json.h"
#include "engine/engine.h"
#include "rpc/server.h"

namespace tensord::daemon {

// Lives on the loop's thread; all references must outlive it.
class Requests {
 public:
  Requests(engine::Engine& engine, DeviceCopies& devices, DaemonFacts facts, std::function<void()> stop)
      : engine_(engine), devices_(devices), facts_(std::move(facts)), stop_(std::move(stop)) {}

  // Set once, before the first request: the server needs handle() to start.
  void reply_through(rpc::Server& server) { server_ = &server; }

  void handle(rpc::Request request);

 private:
  void open(rpc::Request request);
  void call(const rpc::Request& request);
  void used(const rpc::Request& request);
  void copy_to_device(rpc::Request request);
  base::Result<std::string> answer(const protocol::Call& call);
  void reply_json(rpc::ConnectionId connection, uint64_t id, const base::Result<std::string>& json);

  engine::Engine& engine_;
  DeviceCopies& devices_;
  const DaemonFacts facts_;
  const std::function<void()> stop_;
  rpc::Server* server_ = nullptr;
};

}  // namespace tensord::daemon
