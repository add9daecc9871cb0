#include "rpc/server.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <future>
#include <thread>

#include "base/log.h"
#include "rpc/rpc_testing.h"

namespace tensord::rpc {
namespace {

using base::Code;

constexpr int64_t kTestTimeoutMs = 60'000;

// A daemon that serves from a thread of its own. A Call is answered with its selector as the report; `evict`
// with as many megabytes as its selector says; an Open with its descriptors back.
class Daemon {
 public:
  explicit Daemon(ServerOptions options = {}) : loop_(Loop::open().value()) {
    EXPECT_TRUE(base::start_log(base::LogLevel::off, ""));
    options.product_version = "1.2.3";
    options.keep_spans = true;
    if (options.user_id == 0) options.user_id = ::geteuid();
    server_ = std::make_unique<Server>(*loop_, Listener::open(folder_.path()).value(), options,
                                       [this](Request request) { handle(std::move(request)); });
    EXPECT_TRUE(server_->listen());
    thread_ = std::thread([this] { loop_->run(); });
  }
  ~Daemon() {
    loop_->stop();
    thread_.join();
  }

  std::string path() const { return socket_path(folder_.path()); }

  // Runs `work` on the loop's thread and waits for it.
  template <typename Work>
  auto ask(Work work) {
    std::packaged_task<decltype(work(*server_))()> task([&] { return work(*server_); });
    loop_->post([&task] { task(); });
    return task.get_future().get();
  }
  size_t connection_count() {
    return ask([](Server& server) { return server.connection_count(); });
  }
  Client last_client() {
    return ask([this](Server&) { return last_client_; });
  }

 private:
  void handle(Request request) {
    last_client_ = request.client;
    const uint64_t id = request.frame().id();
    if (const auto* call = request.frame().request_as_Call()) {
      const std::string selector = call->selector() != nullptr ? call->selector()->str() : "";
      const bool large = call->verb() == protocol::Verb::evict;
      return server_->reply(request.client.connection,
                            reply_report(id, large ? std::string(std::stoull(selector) << 20, 'x') : selector));
    }
    if (request.frame().request_as_Open() != nullptr) {
      std::vector<int> fds;
      for (const base::Fd& fd : request.fds) fds.push_back(fd.get());
      protocol::OpenedT opened;
      opened.segment_bytes.assign(fds.size(), 4096);
      return server_->reply(request.client.connection, reply_opened(id, opened, fds));
    }
    server_->reply(request.client.connection, reply_failure(id, {Code::unsupported, "not known here"}));
  }

  TemporaryFolder folder_;
  std::unique_ptr<Loop> loop_;
  Client last_client_;
  std::unique_ptr<Server> server_;
  std::thread thread_;
};

Frame request_frame(uint64_t id, protocol::RequestUnion request) {
  protocol::RequestFrameT frame;
  frame.id = id;
  frame.request = std::move(request);
  flatbuffers::FlatBufferBuilder builder;
  builder.Finish(protocol::RequestFrame::Pack(builder, &frame));
  const auto bytes = std::as_bytes(std::span(builder.GetBufferPointer(), builder.GetSize()));
  return {{bytes.begin(), bytes.end()}, {}};
}

Frame call_frame(uint64_t id, const std::string& selector, protocol::Verb verb = protocol::Verb::status) {
  protocol::CallT call;
  call.verb = verb;
  call.selector = selector;
  protocol::RequestUnion request;
  request.Set(std::move(call));
  return request_frame(id, std::move(request));
}

Frame open_frame(uint64_t id, std::vector<std::string> paths) {
  protocol::OpenT open;
  open.path = "/models/m";
  open.paths = std::move(paths);
  protocol::RequestUnion request;
  request.Set(std::move(open));
  return request_frame(id, std::move(request));
}

Frame own_hello(uint32_t protocol_version) {
  protocol::HelloT hello;
  hello.protocol_version = protocol_version;
  hello.product_version = "9.9.9";
  return hello_frame(hello);
}

struct Caller {
  base::Fd socket;
  FrameReader reader;

  void send(Frame frame) { EXPECT_TRUE(send_frame(socket.get(), std::move(frame), kTestTimeoutMs)); }
  Result<Frame> receive() { return receive_frame(socket.get(), reader, kTestTimeoutMs); }
  std::string ask(const std::string& selector) {
    send(call_frame(1, selector));
    const auto answer = receive();
    if (!answer) return answer.error().message;
    const auto& frame = *flatbuffers::GetRoot<protocol::ReplyFrame>(answer->bytes.data());
    return frame.reply_as_Report() != nullptr ? frame.reply_as_Report()->json()->str() : "another reply";
  }
  // Reads until the daemon closes.
  std::string last_words() {
    for (;;) {
      if (const auto frame = receive(); !frame) return frame.error().message;
    }
  }
};

Caller connected(const Daemon& daemon) { return {connect_socket(daemon.path()).value(), {}}; }
Caller greeted(const Daemon& daemon) {
  Caller caller = connected(daemon);
  EXPECT_TRUE(greet(caller.socket.get(), caller.reader, "1.2.3", kTestTimeoutMs));
  return caller;
}
base::Error refusal(Caller& caller) {
  const auto hello = greet(caller.socket.get(), caller.reader, "1.2.3", kTestTimeoutMs);
  return hello ? base::Error{Code::internal, "no refusal"} : hello.error();
}

void expect_gone(Caller& caller, const std::string& why) {
  const std::string words = caller.last_words();
  EXPECT_EQ(words, "the other side closed the connection") << why;
}

TEST(Server, client_and_daemon_greet_each_other) {
  Daemon daemon;
  Caller caller = connected(daemon);
  const auto hello = greet(caller.socket.get(), caller.reader, "1.2.3", kTestTimeoutMs);
  ASSERT_TRUE(hello) << hello.error().message;
  EXPECT_EQ(hello->protocol_version, kProtocolVersion);
  EXPECT_EQ(hello->product_version, "1.2.3");
  EXPECT_EQ(hello->process_id, static_cast<uint32_t>(::getpid()));
  EXPECT_TRUE(hello->keep_spans);
  EXPECT_EQ(caller.ask("words"), "words");
  const Client client = daemon.last_client();
  EXPECT_EQ(client.process_id, ::getpid());
  EXPECT_EQ(client.user_id, ::geteuid());
  EXPECT_EQ(client.process_name, program_invocation_short_name);
}

TEST(Server, requests_sent_at_once_are_answered_in_order) {
  Daemon daemon;
  Caller caller = greeted(daemon);
  for (int at = 0; at < 300; ++at) caller.send(call_frame(at, std::to_string(at)));
  for (int at = 0; at < 300; ++at) {
    const Frame frame = caller.receive().value();
    const auto& reply = *flatbuffers::GetRoot<protocol::ReplyFrame>(frame.bytes.data());
    EXPECT_EQ(reply.id(), static_cast<uint64_t>(at));
    EXPECT_EQ(reply.reply_as_Report()->json()->str(), std::to_string(at));
  }
}

TEST(Server, descriptors_come_with_a_request_and_go_with_a_reply) {
  Daemon daemon;
  Caller caller = greeted(daemon);
  const base::Pipe pipe = base::make_pipe().value();
  Frame frame = open_frame(5, {"/models/m/1", "/models/m/2"});
  for (const base::Fd* end : {&pipe.read_end, &pipe.write_end}) {
    frame.fds.push_back(base::duplicate(end->get()).value());
  }
  caller.send(std::move(frame));
  const Frame answer = caller.receive().value();
  ASSERT_EQ(answer.fds.size(), 2u);
  for (const base::Fd& fd : answer.fds) EXPECT_EQ(inode_of(fd.get()), inode_of(pipe.read_end.get()));
}

TEST(Server, a_client_of_another_protocol_gets_both_versions_and_is_closed) {
  Daemon daemon;
  Caller caller = connected(daemon);
  caller.send(own_hello(kProtocolVersion + 1));
  EXPECT_EQ(parse_hello(caller.receive().value()).value().protocol_version, kProtocolVersion);
  const Frame frame = caller.receive().value();
  const auto& reply = *flatbuffers::GetRoot<protocol::ReplyFrame>(frame.bytes.data());
  ASSERT_NE(reply.reply_as_Failure(), nullptr);
  EXPECT_EQ(reply.id(), 0u);
  EXPECT_EQ(reply.reply_as_Failure()->code(), static_cast<uint8_t>(Code::unsupported));
  EXPECT_EQ(reply.reply_as_Failure()->message()->str(),
            "the daemon speaks protocol 3 (version 1.2.3), this client 4 (version 9.9.9): restart the daemon with "
            "`tensord stop`");
  expect_gone(caller, "other version");
  EXPECT_EQ(daemon.connection_count(), 0u);
}

TEST(Server, a_daemon_of_another_protocol_is_unsupported) {
  const auto [near, far] = socket_pair();
  for (const auto& [version, advice] :
       {std::pair<uint32_t, const char*>{kProtocolVersion - 1, "restart the daemon with `tensord stop`"},
        {kProtocolVersion + 1, "update the client"}}) {
    ASSERT_TRUE(send_frame(far.get(), own_hello(version), kTestTimeoutMs));
    FrameReader reader;
    const auto hello = greet(near.get(), reader, "1.2.3", kTestTimeoutMs);
    ASSERT_FALSE(hello);
    EXPECT_EQ(hello.error().code, Code::unsupported);
    EXPECT_EQ(hello.error().message, "the daemon speaks protocol " + std::to_string(version) +
                                         " (version 9.9.9), this client 3 (version 1.2.3): " + advice);
  }
}

TEST(Server, a_daemon_that_says_something_else_is_corrupt) {
  const auto [near, far] = socket_pair();
  ASSERT_TRUE(send_frame(far.get(), {bytes_of("nonsense"), {}}, kTestTimeoutMs));
  FrameReader reader;
  EXPECT_EQ(greet(near.get(), reader, "1.2.3", kTestTimeoutMs).error().code, Code::corrupt);
}

TEST(Server, another_uid_is_denied_by_name) {
  Daemon daemon({.user_id = ::geteuid() + 1});
  Caller caller = connected(daemon);
  const base::Error error = refusal(caller);
  EXPECT_EQ(error.code, Code::denied);
  EXPECT_EQ(error.message, "this daemon serves uid " + std::to_string(::geteuid() + 1) + " alone, you are uid " +
                               std::to_string(::geteuid()) + ": start one of your own with `tensord serve`");
  expect_gone(caller, "other uid");
}

TEST(Server, connections_over_the_limit_are_refused_until_one_goes) {
  Daemon daemon({.connection_count_max = 2});
  Caller first = greeted(daemon);
  Caller second = greeted(daemon);
  Caller third = connected(daemon);
  const base::Error error = refusal(third);
  EXPECT_EQ(error.code, Code::exhausted);
  EXPECT_EQ(error.message, "the daemon has 2 connections, and takes no more");
  EXPECT_EQ(second.ask("still here"), "still here");
  first.socket.reset();
  while (daemon.connection_count() == 2) std::this_thread::yield();
  EXPECT_EQ(greeted(daemon).ask("fourth"), "fourth");
}

TEST(Server, without_descriptors_a_client_is_refused_and_others_are_served) {
  Daemon daemon;
  Caller served = greeted(daemon);
  Caller refused{base::Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)), {}};
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  daemon.path().copy(address.sun_path, sizeof address.sun_path - 1);
  {
    const NoDescriptorsLeft full;
    ASSERT_EQ(::connect(refused.socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    ASSERT_EQ(::fcntl(refused.socket.get(), F_SETFL, O_NONBLOCK), 0);
    const base::Error error = refusal(refused);
    EXPECT_EQ(error.code, Code::exhausted);
    EXPECT_EQ(error.message, "the daemon may open no more files (ulimit -n)");
    EXPECT_EQ(served.ask("served"), "served");
  }
  EXPECT_EQ(greeted(daemon).ask("again"), "again");
}

TEST(Server, what_is_no_message_closes_the_connection) {
  Daemon daemon;
  for (const bool after_hello : {false, true}) {
    const std::pair<const char*, std::vector<std::byte>> cases[] = {
        {"empty", {}},
        {"garbage", bytes_of("GET / HTTP/1.1\r\n\r\n")},
        {"zeros", std::vector<std::byte>(1000)},
        {"ones", std::vector<std::byte>(1000, std::byte{0xff})},
        {"text too long", call_frame(1, std::string(kTextBytesMax + 1, 'x')).bytes},
        {"path too long", open_frame(1, {std::string(kTextBytesMax + 1, 'x')}).bytes},
        {"too many paths", open_frame(1, std::vector<std::string>(kFrameFdsMax + 1, "x")).bytes},
    };
    for (const auto& [name, bytes] : cases) {
      Caller caller = after_hello ? greeted(daemon) : connected(daemon);
      caller.send({bytes, {}});
      expect_gone(caller, name);
    }
  }
  EXPECT_EQ(daemon.connection_count(), 0u);
}

TEST(Server, bytes_that_are_no_frame_close_the_connection) {
  Daemon daemon;
  Caller caller = connected(daemon);
  ASSERT_EQ(::send(caller.socket.get(), "GET / HTTP/1.1\r\n\r\n", 18, MSG_NOSIGNAL), 18);
  expect_gone(caller, "http");
}

TEST(Server, a_giant_header_closes_the_connection) {
  Daemon daemon;
  Caller caller = greeted(daemon);
  const uint32_t words[] = {kFrameMagic, 0xfffffff0, 0, 0};
  ASSERT_EQ(::send(caller.socket.get(), words, sizeof words, MSG_NOSIGNAL), 16);
  expect_gone(caller, "giant");
}

TEST(Server, a_hello_with_descriptors_is_closed_with_them) {
  Daemon daemon;
  Caller caller = connected(daemon);
  base::Pipe pipe = base::make_pipe().value();
  Frame hello = own_hello(kProtocolVersion);
  hello.fds.push_back(std::move(pipe.write_end));
  caller.send(std::move(hello));
  expect_gone(caller, "descriptors");
  while (!write_end_is_closed(pipe)) std::this_thread::yield();
}

TEST(Server, a_client_that_says_no_hello_is_closed) {
  Daemon daemon({.slow_peer_ms = 1});
  Caller caller = connected(daemon);
  expect_gone(caller, "silent");
}

TEST(Server, a_frame_that_does_not_go_on_is_closed) {
  Daemon daemon({.slow_peer_ms = 1});
  Caller caller = connected(daemon);
  std::vector<std::byte> bytes;
  append_frame(own_hello(kProtocolVersion), bytes);
  const uint32_t words[] = {kFrameMagic, 100, 0, 0};  // the beginning of a request
  const auto beginning = std::as_bytes(std::span(words));
  bytes.insert(bytes.end(), beginning.begin(), beginning.end());
  ASSERT_EQ(::send(caller.socket.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
  const auto hello = caller.receive();
  if (hello) expect_gone(caller, "partial");  // else even the Hello came too late
}

TEST(Server, a_client_that_idles_between_requests_stays) {
  Daemon daemon;
  Caller caller = greeted(daemon);
  EXPECT_EQ(caller.ask("first"), "first");
  EXPECT_EQ(daemon.connection_count(), 1u);
  EXPECT_EQ(caller.ask("second"), "second");
}

TEST(Server, a_client_that_never_reads_is_closed) {
  Daemon daemon({.pending_reply_bytes_max = 4 << 20});
  Caller lazy = greeted(daemon);
  Caller other = greeted(daemon);
  for (int at = 0; at < 8; ++at) lazy.send(call_frame(at, "1", protocol::Verb::evict));
  while (daemon.connection_count() == 2) std::this_thread::yield();
  EXPECT_EQ(other.ask("fine"), "fine");
}

TEST(Server, a_reply_larger_than_the_socket_arrives_whole) {
  Daemon daemon;
  Caller caller = greeted(daemon);
  caller.send(call_frame(1, "20", protocol::Verb::evict));
  caller.send(call_frame(2, "after"));
  EXPECT_GT(caller.receive().value().bytes.size(), 20u << 20);
  EXPECT_EQ(caller.ask("x"), "after");
}

TEST(Server, a_reply_too_large_for_a_frame_is_a_failure) {
  Daemon daemon;
  Caller caller = greeted(daemon);
  caller.send(call_frame(1, "65", protocol::Verb::evict));
  const Frame frame = caller.receive().value();
  const auto& reply = *flatbuffers::GetRoot<protocol::ReplyFrame>(frame.bytes.data());
  ASSERT_NE(reply.reply_as_Failure(), nullptr);
  EXPECT_EQ(reply.reply_as_Failure()->code(), static_cast<uint8_t>(Code::exhausted));
}

TEST(Server, a_client_that_dies_in_the_middle_of_a_frame_is_forgotten) {
  Daemon daemon;
  Caller caller = greeted(daemon);
  base::Pipe pipe = base::make_pipe().value();
  std::vector<std::byte> bytes;
  append_frame(open_frame(1, {"/m"}), bytes);
  bytes.pop_back();
  send_fds(caller.socket.get(), bytes, pipe.write_end.get(), 1);
  pipe.write_end.reset();
  caller.socket.reset();
  while (daemon.connection_count() == 1) std::this_thread::yield();
  EXPECT_TRUE(write_end_is_closed(pipe));
}

TEST(Server, a_client_that_closes_its_sending_half_is_closed) {
  Daemon daemon;
  Caller caller = greeted(daemon);
  ASSERT_EQ(::shutdown(caller.socket.get(), SHUT_WR), 0);
  expect_gone(caller, "half closed");
  EXPECT_EQ(daemon.connection_count(), 0u);
}

TEST(Server, a_reply_to_a_connection_that_is_gone_is_dropped) {
  Daemon daemon;
  daemon.ask([](Server& server) { server.reply(77, reply_report(1, "{}")); });
  EXPECT_EQ(greeted(daemon).ask("fine"), "fine");
}

TEST(Server, a_server_that_stopped_accepting_serves_those_it_has) {
  Daemon daemon;
  Caller caller = greeted(daemon);
  daemon.ask([](Server& server) { server.stop_accepting(); });
  EXPECT_EQ(connect_socket(daemon.path()).error().code, Code::unavailable);
  EXPECT_EQ(caller.ask("still"), "still");
}

TEST(Server, a_reply_with_a_bad_descriptor_or_too_many_is_a_failure) {
  for (const Frame& frame : {reply_opened(7, {}, {-1}), reply_opened(7, {}, std::vector<int>(kFrameFdsMax + 1, 0))}) {
    const auto& reply = *flatbuffers::GetRoot<protocol::ReplyFrame>(frame.bytes.data());
    EXPECT_EQ(reply.id(), 7u);
    EXPECT_NE(reply.reply_as_Failure(), nullptr);
    EXPECT_TRUE(frame.fds.empty());
  }
}

TEST(Server, a_request_of_unknown_kind_is_for_the_handler) {
  Frame frame = call_frame(1, "x");
  auto* root = flatbuffers::GetMutableRoot<flatbuffers::Table>(frame.bytes.data());
  ASSERT_TRUE(root->SetField<uint8_t>(protocol::RequestFrame::VT_REQUEST_TYPE, 200, 0));
  EXPECT_TRUE(check_request(frame.bytes));
  Daemon daemon;
  Caller caller = greeted(daemon);
  caller.send(std::move(frame));
  const Frame answer = caller.receive().value();
  const auto& reply = *flatbuffers::GetRoot<protocol::ReplyFrame>(answer.bytes.data());
  EXPECT_NE(reply.reply_as_Failure(), nullptr);
}

}  // namespace
}  // namespace tensord::rpc
