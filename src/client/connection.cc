#include "client/connection.h"

#include <poll.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "base/text.h"
#include "client/autostart.h"
#include "memory/copy.h"
#include "rpc/messages.h"
#include "rpc/unix_socket.h"

namespace tensord::client {

using base::Code;
using base::fail;
using base::MutexLock;

namespace {
constexpr int64_t kGreetTimeoutMs = 10'000;
constexpr int64_t kTellTimeoutMs = 100;

tl::unexpected<base::Error> no_daemon(const base::Error& why) {
  return fail(Code::unavailable, why.message + "; start a daemon with `tensord serve`");
}

// Names the daemon that is silent.
base::Error from_daemon(int socket, base::Error error) {
  if (const auto peer = rpc::peer_of(socket); peer && error.code == Code::unavailable) {
    error.message += base::text(" (daemon ", peer->process_id, " at ", rpc::socket_path(rpc::runtime_folder()),
                                "; see its log, or end it with `kill ", peer->process_id, "`)");
  }
  return error;
}

bool may_start(Autostart autostart) {
  if (autostart != Autostart::from_environment) return autostart == Autostart::yes;
  const char* wish = std::getenv("TENSORD_AUTOSTART");
  return wish == nullptr || std::strcmp(wish, "0") != 0;
}
}  // namespace

Result<std::unique_ptr<Connection>> Connection::open(Autostart autostart) {
  std::unique_ptr<Connection> connection(new Connection);
  connection->autostart_ = autostart;
  MutexLock lock(connection->mutex_);
  TRY_ASSIGN(const protocol::HelloT hello, connection->connect(autostart, kGreetTimeoutMs));
  connection->keep_spans_ = hello.keep_spans;
  connection->daemon_ = hello.process_id;
  return connection;
}

Result<protocol::HelloT> Connection::connect(Autostart autostart, int64_t timeout_ms) {
  const std::string folder = rpc::runtime_folder();
  auto socket = rpc::connect_socket(rpc::socket_path(folder), timeout_ms);
  if (!socket && socket.error().code == Code::unavailable) {
    if (!may_start(autostart)) return no_daemon(socket.error());
    TRY(start_daemon(folder, kStartTimeoutMs));
    socket = rpc::connect_socket(rpc::socket_path(folder));
  }
  if (!socket) return base::pass_on(socket);
  rpc::FrameReader reader;
  auto greeted = rpc::greet(socket->get(), reader, TENSORD_VERSION, timeout_ms);
  if (!greeted) return tl::unexpected(from_daemon(socket->get(), greeted.error()));
  const protocol::HelloT& hello = *greeted;
  socket_ = std::move(*socket);
  reader_ = std::move(reader);
  process_ = ::getpid();
  if (daemon_ != 0 && hello.process_id != daemon_) telling_ = false;
  return hello;
}

Status Connection::send(protocol::RequestUnion request, std::vector<base::Fd> fds, int64_t timeout_ms) {
  protocol::RequestFrameT frame;
  frame.id = next_id_++;
  frame.request = std::move(request);
  flatbuffers::FlatBufferBuilder builder;
  builder.Finish(protocol::RequestFrame::Pack(builder, &frame));
  rpc::Frame out{.fds = std::move(fds)};
  const auto* bytes = reinterpret_cast<const std::byte*>(builder.GetBufferPointer());
  out.bytes.assign(bytes, bytes + builder.GetSize());
  return rpc::send_frame(socket_.get(), std::move(out), timeout_ms);
}

Result<Answer> Connection::receive(uint64_t id) {
  TRY_ASSIGN(rpc::Frame frame, rpc::receive_frame(socket_.get(), reader_, kAnswerTimeoutMs));
  Answer answer{std::move(frame.bytes), std::move(frame.fds)};
  flatbuffers::Verifier verifier(reinterpret_cast<const uint8_t*>(answer.bytes.data()), answer.bytes.size());
  if (!verifier.VerifyBuffer<protocol::ReplyFrame>(nullptr) || answer.frame().id() != id) {
    return fail(Code::corrupt, "the daemon's answer makes no sense; are daemon and client of one version?");
  }
  return answer;
}

// Until the answer begins to come. What is not `answered` when it is cancelled ends with the connection.
Status Connection::await(uint64_t id, bool answered, const int32_t* cancel) {
  constexpr int kLookMs = 50;
  pollfd answer{socket_.get(), POLLIN, 0};
  while (cancel != nullptr && ::poll(&answer, 1, kLookMs) <= 0) {
    if (memory::check_cancel(cancel)) continue;
    if (!answered) return fail(Code::cancelled, "the caller gave up waiting for the daemon");
    protocol::CancelT body;
    body.id = id;
    return send(request_of(std::move(body)), {}, kAnswerTimeoutMs);
  }
  return {};
}

Result<Answer> Connection::ask(protocol::RequestUnion request, std::vector<base::Fd> fds, const int32_t* cancel) {
  MutexLock lock(mutex_);
  if (process_ != ::getpid() || !socket_.valid()) TRY(connect(autostart_, kGreetTimeoutMs));
  const uint64_t id = next_id_;
  const bool answered = request.type == protocol::Request::CopyToDevice;  // the target is in use until then
  Status sent = send(std::move(request), std::move(fds), kAnswerTimeoutMs);
  if (sent) sent = await(id, answered, cancel);
  Result<Answer> answer = sent ? receive(id) : base::pass_on(sent);
  if (!answer) {
    answer = tl::unexpected(from_daemon(socket_.get(), answer.error()));
    socket_.reset();  // the next call begins anew
    return answer;
  }
  if (const auto* failure = answer->frame().reply_as_Failure()) {
    base::Error error{base::code_from(failure->code()), failure->message()->str()};
    if (failure->target_dirty()) error.target = base::TargetState::dirty;
    return tl::unexpected(std::move(error));
  }
  return answer;
}

void Connection::tell(protocol::RequestUnion request) {
  MutexLock lock(mutex_);
  if (telling_ && process_ != ::getpid()) {  // a forked child
    if (!connect(Autostart::no, kTellTimeoutMs)) telling_ = false;
  }
  telling_ = telling_ && socket_.valid() && send(std::move(request), {}, kTellTimeoutMs);
  if (!telling_) socket_.reset();
}

Result<std::string> call(protocol::Verb verb, const std::string& selector, Autostart autostart) {
  TRY_ASSIGN(const std::unique_ptr<Connection> connection, Connection::open(autostart));
  protocol::CallT body;
  body.verb = verb;
  body.selector = selector;
  TRY_ASSIGN(const Answer answer, connection->ask(request_of(std::move(body)), {}));
  const auto* report = answer.frame().reply_as_Report();
  if (report == nullptr) return fail(Code::corrupt, "the daemon answered something else than a report");
  return report->json()->str();
}

}  // namespace tensord::client
