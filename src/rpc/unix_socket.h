// Unix sockets: where they lie, who may listen, who is at the other end.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "base/fd.h"
#include "base/result.h"

namespace tensord::rpc {

using base::Result;

// $TENSORD_RUNTIME_DIR, else $XDG_RUNTIME_DIR/tensord, else /tmp/tensord-UID.
std::string runtime_folder();
std::string socket_path(const std::string& runtime_folder);  // runtime_folder + "/socket"

// Makes the folder (0700) when missing, with those above it. Code::denied when it belongs to another uid, or
// is open to others (mode & 077); a symbolic link is refused.
base::Status prepare_runtime_folder(const std::string& folder);

// A listening socket with its lock file. The socket (0600) is removed when it goes.
class Listener {
 public:
  // Takes an exclusive lock on runtime_folder/lock first: Code::unavailable, naming the pid in it, when
  // another daemon holds it. A socket left by a dead daemon is replaced. Code::invalid_argument when the path
  // does not fit a socket address.
  static Result<Listener> open(const std::string& runtime_folder);
  Listener(Listener&&) = default;
  Listener& operator=(Listener&&) = delete;
  ~Listener() { close_socket(); }

  // From now on nobody can connect; the lock stays held.
  void close_socket();

  int fd() const { return socket_.get(); }
  const std::string& path() const { return path_; }

 private:
  Listener() = default;
  base::Fd lock_;
  base::Fd socket_;
  std::string path_;
};

inline constexpr int64_t kConnectTimeoutMs = 10'000;

// Waits at most `timeout_ms` for a daemon that does not accept. Code::unavailable when nobody listens (the caller may
// start a daemon) or accepts, Code::denied when the socket's
// folder or the process at the other end belongs to neither this uid nor root. Non-blocking, close-on-exec.
Result<base::Fd> connect_socket(const std::string& path, int64_t timeout_ms = kConnectTimeoutMs);

struct Peer {
  pid_t process_id = 0;  // 0 when it cannot be seen from this pid namespace
  uid_t user_id = 0;
};
Result<Peer> peer_of(int socket);  // SO_PEERCRED

}  // namespace tensord::rpc
