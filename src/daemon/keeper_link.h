// The daemon's side of a keeper, the process that stores descriptors and what belongs to them while no daemon runs.
//
//   frame   [u64 replica][u64 lease, 0: the replica itself] [table KeptReplica or KeptLease; none: what is stored goes]
//           [0][0] to the keeper: give back all that you store; from the keeper: that was all
//
// The daemon connects, at start and as soon as a keeper comes later or again. At start it takes over what comes back; at
// any other time that goes. Then the keeper is told of all that is ready, and of what changes.
#pragma once

#include <string>

#include "engine/engine.h"
#include "rpc/loop.h"
#include "rpc/server.h"

namespace tensord::daemon {

// Lives on the loop's thread; all references must outlive it.
class KeeperLink {
 public:
  KeeperLink(engine::Engine& engine, rpc::Loop& loop, const std::string& runtime_dir)
      : engine_(engine), loop_(loop), path_(runtime_dir + "/keeper") {}

  // To be called once, before `server` listens: runs the loop until a keeper that is there has given back what it
  // stores, at most kTakeMs.
  void start(rpc::Server& server);
  // To be called when any connection of the server has ended.
  void closed(rpc::ConnectionId connection);

 private:
  base::Status connect();
  void look();
  base::Status receive(rpc::Frame frame);
  void tell(uint64_t number, uint64_t lease);

  engine::Engine& engine_;
  rpc::Loop& loop_;
  const std::string path_;
  rpc::Server* server_ = nullptr;
  rpc::ConnectionId connection_ = 0;
  bool starting_ = true;
  std::string told_;    // why it is not connected, to say that once
  bool ready_ = false;  // it has given back all: one that sleeps is sent no descriptors
};

}  // namespace tensord::daemon
