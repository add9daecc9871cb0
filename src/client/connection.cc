#include "client/connection.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "base/text.h"
#include "client/autostart.h"
#include "client/version.h"
#include "rpc/server.h"
#include "rpc/unix_socket.h"

namespace tensord::client {

using base::Code;
using base::fail;
using base::MutexLock;

namespace {
constexpr int64_t kGreetTimeoutMs = 10'000;

tl::unexpected<base::Error> no_daemon(const base::Error& why) {
  return fail(Code::unavailable, why.message + "; start a daemon with `tensord serve`");
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
  TRY(connection->connect());
  return connection;
}

Status Connection::connect() {
  const std::string folder = rpc::runtime_folder();
  auto socket = rpc::connect_socket(rpc::socket_path(folder));
  if (!socket && socket.error().code == Code::unavailable) {
    if (!may_start(autostart_)) {
      return no_daemon(socket.error());
    }
    TRY(start_daemon(folder, kStartTimeoutMs));
    socket = rpc::connect_socket(rpc::socket_path(folder));
  }
  if (!socket) return base::pass_on(socket);
  rpc::FrameReader reader;
  TRY_ASSIGN(const protocol::HelloT hello, rpc::greet(socket->get(), reader, kVersion, kGreetTimeoutMs));
  socket_ = std::move(*socket);
  reader_ = std::move(reader);
  process_ = ::getpid();
  keep_spans_ = hello.keep_spans;
  return {};
}

Status Connection::send(protocol::RequestUnion request, const std::vector<int>& fds) {
  if (process_ != ::getpid() || !socket_.valid()) TRY(connect());
  protocol::RequestFrameT frame;
  frame.id = next_id_++;
  frame.request = std::move(request);
  flatbuffers::FlatBufferBuilder builder;
  builder.Finish(protocol::RequestFrame::Pack(builder, &frame));
  rpc::Frame out;
  const auto* bytes = reinterpret_cast<const std::byte*>(builder.GetBufferPointer());
  out.bytes.assign(bytes, bytes + builder.GetSize());
  for (const int fd : fds) {
    TRY_ASSIGN(base::Fd copy, base::duplicate(fd));
    out.fds.push_back(std::move(copy));
  }
  return rpc::send_frame(socket_.get(), std::move(out), kAnswerTimeoutMs);
}

Result<Answer> Connection::ask(protocol::RequestUnion request, const std::vector<int>& fds) {
  MutexLock lock(mutex_);
  const uint64_t id = next_id_;
  const auto broken = [&](base::Error error) {
    socket_.reset();  // the next call begins anew
    return tl::unexpected(std::move(error));
  };
  if (Status sent = send(std::move(request), fds); !sent) return broken(sent.error());
  auto frame = rpc::receive_frame(socket_.get(), reader_, kAnswerTimeoutMs);
  if (!frame) return broken(frame.error());
  Answer answer{std::move(frame->bytes), std::move(frame->fds)};
  flatbuffers::Verifier verifier(reinterpret_cast<const uint8_t*>(answer.bytes.data()), answer.bytes.size());
  if (!verifier.VerifyBuffer<protocol::ReplyFrame>(nullptr) || answer.frame().id() != id) {
    return broken(
        {Code::corrupt, "the daemon's answer makes no sense; are daemon and client of one version?"});
  }
  if (const auto* failure = answer.frame().reply_as_Failure()) {
    const bool known = failure->code() >= 1 && failure->code() <= static_cast<uint8_t>(Code::internal);
    return fail(known ? static_cast<Code>(failure->code()) : Code::internal, failure->message()->str());
  }
  return answer;
}

void Connection::tell(protocol::RequestUnion request) {
  MutexLock lock(mutex_);
  if (process_ != ::getpid()) autostart_ = Autostart::no;  // a report is no reason to start a daemon
  if (!send(std::move(request), {})) socket_.reset();
}

Result<pid_t> daemon_process() {
  const auto socket = rpc::connect_socket(rpc::socket_path(rpc::runtime_folder()));
  if (!socket && socket.error().code == Code::unavailable) return no_daemon(socket.error());
  if (!socket) return base::pass_on(socket);
  TRY_ASSIGN(const rpc::Peer peer, rpc::peer_of(socket->get()));
  return peer.process_id;
}

Result<std::string> call(protocol::Verb verb, const std::string& selector, Autostart autostart) {
  TRY_ASSIGN(const std::unique_ptr<Connection> connection, Connection::open(autostart));
  protocol::CallT body;
  body.verb = verb;
  body.selector = selector;
  protocol::RequestUnion request;
  request.Set(std::move(body));
  TRY_ASSIGN(const Answer answer, connection->ask(std::move(request), {}));
  const auto* report = answer.frame().reply_as_Report();
  if (report == nullptr) return fail(Code::corrupt, "the daemon answered something else than a report");
  return report->json()->str();
}

}  // namespace tensord::client
