// Connection: one socket to the daemon, which is started when none runs.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "base/fd.h"
#include "base/mutex.h"
#include "base/result.h"
#include "protocol/tensord_generated.h"
#include "rpc/frame.h"

namespace tensord::client {

using base::Result;
using base::Status;

enum class Autostart : uint8_t { from_environment, yes, no };  // $TENSORD_AUTOSTART, 1 when unset

// How long a started daemon may take until it listens.
inline constexpr int64_t kStartTimeoutMs = 15'000;  // one that is stopping may take 10 s to let go
// How long a daemon may take to answer. Opening waits for the headers of all files, which may lie on a slow disk;
// verifying reads every byte of an artifact.
inline constexpr int64_t kAnswerTimeoutMs = 600'000;

// A verified answer; `frame()` lies in `bytes`.
struct Answer {
  std::vector<std::byte> bytes;
  std::vector<base::Fd> fds;
  const protocol::ReplyFrame& frame() const { return *flatbuffers::GetRoot<protocol::ReplyFrame>(bytes.data()); }
};

template <typename Body>
protocol::RequestUnion request_of(Body body) {
  protocol::RequestUnion request;
  request.Set(std::move(body));
  return request;
}

// Thread safe. Safe across fork: a child makes a connection of its own at its first call.
class Connection {
 public:
  static Result<std::unique_ptr<Connection>> open(Autostart autostart);

  // Sends a request with descriptors and waits for its answer. A Failure comes back as its error. Once `cancel` points to
  // another number than 0 the daemon is told to end it: Code::cancelled, for copies to devices when none is under way.
  Result<Answer> ask(protocol::RequestUnion request, std::vector<base::Fd> fds, const int32_t* cancel = nullptr);

  // Sends a request that has no answer, to the daemon that this connection was opened to and to no other. What goes
  // wrong is forgotten, and ends the telling: a statistic is not worth waiting for, nor a daemon to be started.
  void tell(protocol::RequestUnion request);

  Autostart autostart() const { return autostart_; }
  bool keep_spans() const { return keep_spans_; }  // constant after open()

 private:
  Connection() = default;
  Result<protocol::HelloT> connect(Autostart autostart, int64_t timeout_ms) REQUIRES(mutex_);
  Status send(protocol::RequestUnion request, std::vector<base::Fd> fds, int64_t timeout_ms) REQUIRES(mutex_);
  Result<Answer> receive(uint64_t id) REQUIRES(mutex_);
  Status await(uint64_t id, bool answered, const int32_t* cancel) REQUIRES(mutex_);

  Autostart autostart_ = Autostart::from_environment;  // constant after open(), as the next two
  bool keep_spans_ = false;
  uint32_t daemon_ = 0;  // its pid, as it says: replica numbers are its own
  base::Mutex mutex_;
  base::Fd socket_ GUARDED_BY(mutex_);
  rpc::FrameReader reader_ GUARDED_BY(mutex_);
  pid_t process_ GUARDED_BY(mutex_) = 0;  // who made the socket
  uint64_t next_id_ GUARDED_BY(mutex_) = 1;
  bool telling_ GUARDED_BY(mutex_) = true;
};

// A management verb; the answer is JSON (docs/PROTOCOL.md).
Result<std::string> call(protocol::Verb verb, const std::string& selector, Autostart autostart);

}  // namespace tensord::client
