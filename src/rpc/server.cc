#include "rpc/server.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "base/log.h"
#include "base/text.h"

namespace tensord::rpc {

using base::Code;
using base::Error;
using base::log;
using base::LogLevel;
using base::text;

namespace {

constexpr int kAcceptsPerTurn = 64;      // so that those already served are not kept waiting
constexpr int64_t kAcceptPauseMs = 100;  // when there is neither a descriptor nor the spare one

}  // namespace

Server::Server(Loop& loop, Listener listener, ServerOptions options, Handler handler)
    : loop_(loop),
      listener_(std::move(listener)),
      options_(std::move(options)),
      handler_(std::move(handler)),
      spare_(::open("/dev/null", O_RDONLY | O_CLOEXEC)) {}

Status Server::listen() {
  return loop_.watch(listener_.fd(), EPOLLIN, [this](uint32_t) { accept_some(); });
}

Server::~Server() {
  stop_accepting();
  for (auto& [id, connection] : connections_) {
    loop_.cancel(connection->deadline);
    loop_.unwatch(connection->socket.get());
  }
}

void Server::stop_accepting() {
  loop_.cancel(accept_again_);
  loop_.unwatch(listener_.fd());
  listener_.close_socket();
}

void Server::accept_some() {
  for (int turn = 0; turn < kAcceptsPerTurn; ++turn) {
    base::Fd socket(::accept4(listener_.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (socket.valid()) {
      admit(std::move(socket));
    } else if (errno == EAGAIN) {
      return;
    } else if (errno == EMFILE || errno == ENFILE) {
      if (!refuse_with_spare()) return pause_accepting();
    } else if (errno != EINTR && errno != ECONNABORTED) {
      log(LogLevel::error, base::errno_error("accept a connection", errno).message);
      return pause_accepting();
    }
  }
}

void Server::pause_accepting() {
  loop_.change(listener_.fd(), 0);
  accept_again_ = loop_.call_after(kAcceptPauseMs, [this] { loop_.change(listener_.fd(), EPOLLIN); });
}

bool Server::refuse_with_spare() {
  spare_.reset();
  base::Fd socket(::accept4(listener_.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  const bool accepted = socket.valid() || errno == EAGAIN;
  if (socket.valid()) refuse(socket.get(), {Code::exhausted, "the daemon may open no more files (ulimit -n)"});
  socket.reset();
  spare_.reset(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  return accepted && spare_.valid();
}

protocol::HelloT Server::hello() const {
  protocol::HelloT hello;
  hello.protocol_version = kProtocolVersion;
  hello.product_version = options_.product_version;
  hello.process_id = static_cast<uint32_t>(::getpid());
  hello.process_name = "tensord";
  hello.keep_spans = options_.keep_spans;
  return hello;
}

// In one write, as greet() expects; a fresh socket has room for it.
void Server::refuse(int socket, const Error& why) const {
  log(LogLevel::warning, "refused a client: ", why.message);
  std::vector<std::byte> bytes;
  for (const Frame& frame : {hello_frame(hello()), reply_failure(0, why)}) append_frame(frame, bytes);
  if (::send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
    log(LogLevel::debug, base::errno_error("tell it so", errno).message);
  }
}

void Server::admit(base::Fd socket) {
  const auto peer = peer_of(socket.get());
  if (!peer) return refuse(socket.get(), peer.error());
  if (peer->user_id != options_.user_id) {
    return refuse(socket.get(), {Code::denied, text("this daemon serves uid ", options_.user_id, " alone, you are uid ",
                                                    peer->user_id, ": start one of your own with `tensord serve`")});
  }
  if (connections_.size() >= options_.connection_count_max) {
    return refuse(socket.get(),
                  {Code::exhausted, text("the daemon has ", connections_.size(), " connections, and takes no more")});
  }
  if (const auto attached = attach(socket); !attached) refuse(socket.get(), attached.error());
}

Result<ConnectionId> Server::attach(base::Fd& socket, Taker taker) {
  TRY_ASSIGN(const Peer peer, peer_of(socket.get()));
  const ConnectionId id = next_id_++;
  TRY(loop_.watch(socket.get(), EPOLLIN, [this, id](uint32_t events) { on_ready(id, events); }));
  auto connection = std::make_shared<Connection>();
  connection->socket = std::move(socket);
  connection->client = {id, peer.process_id, peer.user_id, ""};
  connection->greeted = taker != nullptr;
  connection->taker = std::move(taker);
  set_deadline(*connection, false);
  connections_.emplace(id, std::move(connection));
  return id;
}

void Server::on_ready(ConnectionId id, uint32_t events) {
  const std::shared_ptr<Connection> connection = connections_.at(id);
  if ((events & EPOLLOUT) != 0) flush(*connection);
  if (connection->socket.valid() && (events & ~uint32_t{EPOLLOUT}) != 0) receive(*connection);
}

void Server::receive(Connection& connection) {
  if (const Status received = connection.reader.read_from(connection.socket.get()); !received) {
    return close(connection, received.error());
  }
  bool progressed = false;
  while (connection.socket.valid()) {
    auto frame = connection.reader.next();
    if (!frame) return close(connection, frame.error());
    if (!*frame) return set_deadline(connection, progressed);
    progressed = true;
    take(connection, std::move(**frame));
  }
}

void Server::take(Connection& connection, Frame frame) {
  if (connection.taker) {
    if (const Status taken = connection.taker(std::move(frame)); !taken) close(connection, taken.error());
    return;
  }
  const Status taken = connection.greeted ? check_request(frame.bytes) : take_hello(connection, frame);
  if (!taken) return close(connection, taken.error());
  if (std::exchange(connection.greeted, true)) {
    handler_(Request{connection.client, std::move(frame.bytes), std::move(frame.fds)});
  }
}

Status Server::take_hello(Connection& connection, const Frame& frame) {
  TRY_ASSIGN(protocol::HelloT client, parse_hello(frame));
  connection.client.process_name = client.process_name;
  if (connection.client.process_id == 0) connection.client.process_id = static_cast<pid_t>(client.process_id);
  if (client.protocol_version != kProtocolVersion) {
    refuse(connection.socket.get(), version_mismatch(hello(), client));
    return base::fail(Code::unavailable, "refused");
  }
  connection.writer.push(hello_frame(hello()));
  flush(connection);
  return {};
}

void Server::reply(ConnectionId id, Frame frame) {
  const auto found = connections_.find(id);
  if (found == connections_.end()) return;
  const std::shared_ptr<Connection> connection = found->second;
  connection->writer.push(std::move(frame));
  if (!connection->waits_to_write) flush(*connection);
  if (connection->socket.valid() && (connection->writer.pending_bytes() > options_.pending_reply_bytes_max ||
                                     connection->writer.pending_fds() > kPendingReplyFdsMax)) {
    close(*connection, {Code::exhausted, "it does not read its replies"});
  }
}

void Server::flush(Connection& connection) {
  const auto done = connection.writer.write_to(connection.socket.get());
  if (!done) return close(connection, done.error());
  if (connection.waits_to_write == !*done) return;
  connection.waits_to_write = !*done;
  loop_.change(connection.socket.get(), connection.waits_to_write ? EPOLLIN | EPOLLOUT : EPOLLIN);
}

void Server::set_deadline(Connection& connection, bool progressed) {
  if (progressed) loop_.cancel(std::exchange(connection.deadline, {}));
  const bool waits = !connection.greeted || connection.reader.is_partial();
  if (!waits || connection.deadline != Loop::TimerId{}) return;
  connection.deadline = loop_.call_after(options_.slow_peer_ms, [this, id = connection.client.connection] {
    const std::shared_ptr<Connection> slow = connections_.at(id);
    close(*slow, {Code::unavailable, text("it took more than ", options_.slow_peer_ms, " ms for one message")});
  });
}

void Server::close(Connection& connection, const Error& why) {
  const Client& client = connection.client;
  log(why.code == Code::unavailable ? LogLevel::debug : LogLevel::warning, "closed the connection of pid ",
      client.process_id, " ", base::quoted(client.process_name), ": ", why.message);
  loop_.cancel(connection.deadline);
  loop_.unwatch(connection.socket.get());
  connection.socket.reset();
  const ConnectionId id = client.connection;
  connections_.erase(id);
  if (options_.closed) options_.closed(id);
}

}  // namespace tensord::rpc
