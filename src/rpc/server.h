// Serves the local protocol: accepts, checks who is there, exchanges Hello, verifies every message, hands out requests.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/fd.h"
#include "protocol/tensord_generated.h"
#include "rpc/frame.h"
#include "rpc/loop.h"
#include "rpc/unix_socket.h"

namespace tensord::rpc {

// The first number changes with every change that an old reader would misunderstand.
inline constexpr uint32_t kProtocolVersion = 1;

// A connection with a frame begun, or without a Hello, is closed after this long.
inline constexpr int64_t kSlowPeerMs = 10'000;
inline constexpr size_t kConnectionCountMax = 4096;
// A client that does not read its replies is closed when this much waits for it.
inline constexpr size_t kPendingReplyBytesMax = 2ull * kFrameBytesMax;

using ConnectionId = uint64_t;

struct Client {
  ConnectionId connection = 0;
  pid_t process_id = 0;
  uid_t user_id = 0;
  std::string process_name;
};

// A verified request; `frame()` lies in `bytes`.
struct Request {
  Client client;
  std::vector<std::byte> bytes;
  std::vector<base::Fd> fds;
  const protocol::RequestFrame& frame() const { return *flatbuffers::GetRoot<protocol::RequestFrame>(bytes.data()); }
};

// A reply to build: message bytes and the descriptors that go with it (borrowed by number: duplicated at once).
Frame reply_opened(uint64_t request_id, const protocol::OpenedT& opened, const std::vector<int>& fds);
Frame reply_report(uint64_t request_id, const std::string& json);
Frame reply_failure(uint64_t request_id, const base::Error& error);

struct ServerOptions {
  std::string product_version;
  bool keep_spans = false;
  uid_t user_id = 0;  // who may connect; others are refused with Code::denied
};

// Lives on the loop's thread. `loop` must outlive it.
class Server {
 public:
  using Handler = std::function<void(Request)>;
  static Result<std::unique_ptr<Server>> start(Loop& loop, Listener listener, ServerOptions options, Handler handler);
  virtual ~Server() = default;

  // Sends a reply; a connection that is gone is no error: the frame is dropped.
  virtual void reply(ConnectionId connection, Frame frame) = 0;
  virtual size_t connection_count() const = 0;
  // Stops accepting; established connections stay.
  virtual void stop_accepting() = 0;
};

// The client's half of the first exchange: sends Hello, reads the daemon's. Code::unsupported, naming both versions
// and what to do, when protocol versions differ; Code::denied when the daemon refuses this uid.
Result<protocol::HelloT> greet(int socket, FrameReader& reader, const std::string& product_version, int64_t timeout_ms);

}  // namespace tensord::rpc
