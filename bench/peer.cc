#include "bench/peer.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "base/text.h"

namespace tensord::bench {

using base::Code;
using nlohmann::json;

namespace {

constexpr const char* kScript = TENSORD_SOURCE_FOLDER "/bench/peers.py";
constexpr int kReplyTimeoutMs = 30'000;  // nine times that would not fit into a suite
constexpr const char* kProduct = "tensord, Python";

}  // namespace

Result<std::unique_ptr<Peer>> Peer::start(const std::string& python, const std::string& name) {
  int to_peer[2], to_us[2];
  if (::pipe2(to_peer, O_CLOEXEC) != 0 || ::pipe2(to_us, O_CLOEXEC) != 0) {
    return tl::unexpected(base::errno_error("make pipes for " + name, errno));
  }
  std::unique_ptr<Peer> peer(new Peer);
  base::Fd request_end(to_peer[0]), reply_end(to_us[1]);
  peer->requests_.reset(to_peer[1]);
  peer->replies_.reset(to_us[0]);
  peer->pid_ = ::fork();
  if (peer->pid_ < 0) return tl::unexpected(base::errno_error("start " + name, errno));
  if (peer->pid_ == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::dup2(request_end.get(), STDIN_FILENO);
    ::dup2(reply_end.get(), STDOUT_FILENO);
    ::setenv("PYTHONPATH", TENSORD_SOURCE_FOLDER "/python", 1);
    ::execl(python.c_str(), python.c_str(), kScript, "serve", name.c_str(), nullptr);
    ::_exit(127);
  }
  request_end.reset();
  reply_end.reset();  // or a peer that dies would leave the pipe open
  TRY_ASSIGN(const json hello, peer->receive());
  peer->package_ = hello.at("package");
  peer->version_ = hello.at("version");
  return peer;
}

Peer::~Peer() { stop(); }

void Peer::stop() {
  if (pid_ <= 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

Status Peer::send(const json& request) {
  const std::string line = request.dump() + "\n";
  for (size_t at = 0; at < line.size();) {
    const ssize_t count = ::write(requests_.get(), line.data() + at, line.size() - at);
    if (count < 0) return tl::unexpected(base::errno_error("ask a peer", errno));
    at += static_cast<size_t>(count);
  }
  return {};
}

Result<json> Peer::receive() {
  size_t end;
  while ((end = unread_.find('\n')) == unread_.npos) {
    pollfd waited{replies_.get(), POLLIN, 0};
    std::array<char, 4096> piece;
    if (pid_ > 0 && ::poll(&waited, 1, kReplyTimeoutMs) <= 0) {
      stop();  // an answer that comes later would be taken for another one's
      return base::fail(Code::unavailable, "no answer within 30 s");
    }
    const ssize_t count = ::read(replies_.get(), piece.data(), piece.size());
    if (count <= 0) return base::fail(Code::unavailable, "a peer is gone; its last words are above");
    unread_.append(piece.data(), static_cast<size_t>(count));
  }
  json answer = json::parse(unread_.substr(0, end), nullptr, false);
  unread_.erase(0, end + 1);
  if (!answer.is_object()) return base::fail(Code::corrupt, "a peer's answer is no JSON");
  if (answer.contains("cannot")) return base::fail(Code::unsupported, answer.at("cannot").get<std::string>());
  if (answer.contains("error")) return base::fail(Code::internal, answer.at("error").get<std::string>());
  return answer;
}

Result<json> Peer::ask(const json& request) {
  TRY(send(request));
  return receive();
}

Result<Sample> ask_together(Bench& bench, const std::string& name, int number, const json& request,
                            std::vector<pid_t> others) {
  std::vector<Peer*> peers(static_cast<size_t>(number));
  for (int at = 0; at < number; ++at) {
    TRY_ASSIGN(peers[static_cast<size_t>(at)], bench.peer(name, at));
  }
  const Stopwatch daemons(std::move(others));  // this process itself only waits
  for (Peer* peer : peers) TRY(peer->send(request));
  int64_t begin_ns = INT64_MAX, end_ns = 0;
  double cpu_s = 0;
  Status failed;
  for (Peer* peer : peers) {
    const auto answer = peer->receive();  // all of them, whatever one says
    if (!answer) {
      failed = base::pass_on(answer);
    } else if (answer->contains("end_ns")) {
      begin_ns = std::min(begin_ns, answer->at("begin_ns").get<int64_t>());
      end_ns = std::max(end_ns, answer->at("end_ns").get<int64_t>());
      cpu_s += answer->at("cpu_s").get<double>();
    }
  }
  TRY(failed);
  return Sample(static_cast<double>(end_ns - begin_ns) / 1e9, cpu_s + daemons.read().cpu_s);
}

std::vector<Contender> peer_acts(Bench& bench, const Daemon& daemon, json request, std::function<Status()> before,
                                 uint64_t fresh_bytes) {
  std::vector<Contender> acts;
  if (bench.options().python.empty()) return acts;
  request["environment"] = daemon.environment();
  for (const std::string& name : bench.options().peers) {
    acts.push_back({name, [&bench, &daemon, request, before, fresh_bytes, name]() -> Result<Sample> {
                      TRY(bench.peer(name));
                      TRY(before());
                      const bool is_product = name == kProduct;
                      if (!is_product && fresh_bytes > 0) touch_free_memory(fresh_bytes);
                      return ask_together(bench, name, 1, request,
                                          is_product ? std::vector{daemon.pid()} : std::vector<pid_t>());
                    }});
  }
  return acts;
}

std::vector<Contender> slice_peers(Bench& bench, const Daemon& daemon, const std::string& path,
                                   const std::vector<std::vector<Slice>>& slices) {
  std::vector<Contender> acts;
  if (bench.options().python.empty()) return acts;
  for (const std::string& name : bench.options().peers) {
    const auto is_open = std::make_shared<bool>(false);
    acts.push_back(
        {name, [&bench, &daemon, path, slices, name, is_open]() -> Result<Sample> {
           for (size_t number = 0; !*is_open && number < slices.size(); ++number) {
             json pieces = json::array();
             for (const Slice& slice : slices[number]) {
               pieces.push_back({slice.name, slice.row_begin, slice.row_count, slice.column_begin, slice.column_count});
             }
             TRY_ASSIGN(Peer * peer, bench.peer(name, static_cast<int>(number)));
             TRY(peer->ask({{"act", "open_slices"},
                            {"path", path},
                            {"slices", std::move(pieces)},
                            {"environment", daemon.environment()}}));
           }
           *is_open = true;
           return ask_together(bench, name, static_cast<int>(slices.size()), {{"act", "gather"}},
                               name == kProduct ? std::vector{daemon.pid()} : std::vector<pid_t>());
         }});
  }
  return acts;
}

}  // namespace tensord::bench
