// Serves the local protocol: accepts, checks who is there, exchanges Hello, verifies every message, hands out
// requests.
//
//   accepted --(another uid, no room: Hello + Failure)--> closed
//      | Hello
//      +--(another protocol version: Hello + Failure)--> closed
//      | Hello back
//   served: requests in, replies out, until either side closes, breaks the protocol, or is too slow
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
#include "rpc/messages.h"
#include "rpc/unix_socket.h"

namespace tensord::rpc {

// A connection with a frame begun, or without a Hello, is closed after this long.
inline constexpr int64_t kSlowPeerMs = 10'000;
inline constexpr size_t kConnectionCountMax = 4096;
// A client that does not read its replies is closed when more than this waits for it.
inline constexpr size_t kPendingReplyBytesMax = 2ull * kFrameBytesMax;
inline constexpr size_t kPendingReplyFdsMax = 2ull * kFrameFdsMax;

using ConnectionId = uint64_t;

struct Client {
  ConnectionId connection = 0;
  pid_t process_id = 0;      // as the kernel knows it; as the client says where the kernel cannot tell
  uid_t user_id = 0;         // as the kernel knows it
  std::string process_name;  // as the client says
};

// A verified request; `frame()` lies in `bytes`. Its kind may be unknown here; its descriptors are not
// counted yet.
struct Request {
  Client client;
  std::vector<std::byte> bytes;
  std::vector<base::Fd> fds;
  const protocol::RequestFrame& frame() const { return *flatbuffers::GetRoot<protocol::RequestFrame>(bytes.data()); }
};

struct ServerOptions {
  std::string product_version;
  bool keep_spans = false;
  uid_t user_id = 0;  // who may connect; others are refused with Code::denied
  int64_t slow_peer_ms = kSlowPeerMs;
  size_t connection_count_max = kConnectionCountMax;
  size_t pending_reply_bytes_max = kPendingReplyBytesMax;
  std::function<void(ConnectionId)> closed;  // told in the midst of server calls: to be acted on later
};

// Lives on the loop's thread. `loop` must outlive it. Not to be destroyed in a handler.
class Server {
 public:
  // May call reply() before it returns, or later.
  using Handler = std::function<void(Request)>;
  Server(Loop& loop, Listener listener, ServerOptions options, Handler handler);
  ~Server();

  Status listen();  // once: clients are served from now on
  // Whole frames of a connection that is no client's: made from here, without Hello. An error closes it.
  using Taker = std::function<Status(Frame)>;
  // Takes the socket, unless it fails.
  Result<ConnectionId> attach(base::Fd& socket, Taker taker = nullptr);

  // Sends a reply; a connection that is gone is no error: the frame is dropped. A client that closed its
  // sending half is gone.
  void reply(ConnectionId connection, Frame frame);
  size_t connection_count() const { return connections_.size(); }
  // Stops accepting and removes the socket; the lock and established connections stay.
  void stop_accepting();

 private:
  struct Connection {
    base::Fd socket;
    Client client;
    Taker taker;
    bool greeted = false;
    bool waits_to_write = false;
    Loop::TimerId deadline;  // a default one while none runs
    FrameReader reader;
    FrameWriter writer;
  };

  void accept_some();
  void pause_accepting();
  bool refuse_with_spare();
  void admit(base::Fd socket);
  void refuse(int socket, const base::Error& why) const;
  protocol::HelloT hello() const;

  void on_ready(ConnectionId id, uint32_t events);
  void receive(Connection& connection);
  void take(Connection& connection, Frame frame);
  Status take_hello(Connection& connection, const Frame& frame);
  void flush(Connection& connection);
  void set_deadline(Connection& connection, bool progressed);
  void close(Connection& connection, const base::Error& why);

  Loop& loop_;
  Listener listener_;
  const ServerOptions options_;
  const Handler handler_;
  base::Fd spare_;  // given up for a moment to refuse a client when no descriptor is left
  Loop::TimerId accept_again_;
  ConnectionId next_id_ = 1;
  // Shared so that a connection that closes while its requests are handled stays until that is over; the
  // socket of a closed one is not valid.
  std::unordered_map<ConnectionId, std::shared_ptr<Connection>> connections_;
};

}  // namespace tensord::rpc
