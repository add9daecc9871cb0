// The daemon's side of a keeper, the process that stores descriptors and what belongs to them while no daemon runs.
//
//   frame   [u32 verb][u32 zero][u64 replica][u64 lease, 0: the replica itself] [table KeptReplica or KeptLease]
//
// A keeper is looked for at start, where the daemon takes over what it has, and once a second: one that comes later, or
// again, is told everything.
#pragma once

#include <string>
#include <vector>

#include "engine/engine.h"
#include "rpc/frame.h"
#include "rpc/loop.h"

namespace tensord::daemon {

// Lives on the loop's thread; all references must outlive it.
class KeeperLink final : public engine::Keeper {
 public:
  KeeperLink(engine::Engine& engine, rpc::Loop& loop, const std::string& runtime_dir)
      : engine_(engine), loop_(loop), path_(runtime_dir + "/keeper") {}
  ~KeeperLink() override { close(); }

  // To be called once, before anybody is served: waits for a keeper that is there, at most kTakeMs.
  void start();

  void keep(const engine::Replica& replica) override;
  void keep_lease(const engine::Replica& replica, uint64_t lease) override;
  void drop_lease(const engine::Replica& replica, uint64_t lease) override;
  void drop(uint64_t replica) override;

 private:
  base::Status take_over();
  void look();
  void receive();
  void tell_all();
  base::Status attend();
  void send(rpc::Frame frame);
  void flush();
  void close();

  engine::Engine& engine_;
  rpc::Loop& loop_;
  const std::string path_;
  base::Fd socket_;
  rpc::FrameReader reader_;
  rpc::FrameWriter writer_;
  bool ready_ = false;          // it has said that it listens
  int64_t asked_ns_ = 0;        // when it was asked to
  int64_t leave_alone_ns_ = 0;  // until then: it did not answer
};

}  // namespace tensord::daemon
