// Peers: other loaders, each in a process of bench/peers.py that stays alive between rounds.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/gather.h"
#include "bench/measure.h"
#include "bench/processes.h"

namespace tensord::bench {

// One request at a time: send, then receive. Ends with the object.
class Peer {
 public:
  static Result<std::unique_ptr<Peer>> start(const std::string& python, const std::string& name);
  Peer(Peer&&) = delete;
  ~Peer();

  Status send(const nlohmann::json& request);
  // Code::unsupported with the reason where the peer has no way to do it.
  Result<nlohmann::json> receive();
  Result<nlohmann::json> ask(const nlohmann::json& request);

  pid_t pid() const { return pid_; }
  const std::string& package() const { return package_; }
  const std::string& version() const { return version_; }  // empty: of this tree

 private:
  Peer() = default;
  void stop();
  pid_t pid_ = -1;
  base::Fd requests_, replies_;
  std::string unread_;
  std::string package_, version_;
};

// The same request to `number` peers of one name at once: from the first beginning to the last end.
Result<Sample> ask_together(Bench& bench, const std::string& name, int number, const nlohmann::json& request,
                            std::vector<pid_t> others = {});

// `request` as an act of every peer of the options; none without a python. `before` runs outside the clock, and then
// `fresh_bytes` of free memory are touched, for those that allocate: machines that report free memory to their host
// would time the host otherwise.
std::vector<Contender> peer_acts(Bench& bench, const Daemon& daemon, nlohmann::json request,
                                 std::function<Status()> before, uint64_t fresh_bytes);

// Copies of slices out of `path`, open and hot, by as many processes of each peer as there are elements, into warm
// memory of their own. Bench::drop_peers when done.
std::vector<Contender> slice_peers(Bench& bench, const Daemon& daemon, const std::string& path,
                                   const std::vector<std::vector<Slice>>& slices);

}  // namespace tensord::bench
