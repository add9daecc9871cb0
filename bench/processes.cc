#include "bench/processes.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "base/clock.h"
#include "base/text.h"

namespace tensord::bench {

using base::Code;

namespace {

// What only something broken takes longer than.
constexpr int64_t kDeadlineNs = 30'000'000'000;
constexpr auto kPause = std::chrono::milliseconds(1);

// The child's side of Daemon::start().
[[noreturn]] void become_daemon(const std::string& binary, const std::string& log) {
  ::prctl(PR_SET_PDEATHSIG, SIGTERM);
  const int fd = ::open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
  ::dup2(fd, STDOUT_FILENO);
  ::dup2(fd, STDERR_FILENO);
  ::execl(binary.c_str(), binary.c_str(), "serve", nullptr);
  ::_exit(127);
}

std::string last_line(const std::string& path) {
  std::ifstream file(path);
  std::string line, last;
  while (std::getline(file, line)) last = line;
  return last;
}

}  // namespace

Result<Daemon> Daemon::start(const Options& options) {
  std::string folder = (std::filesystem::temp_directory_path() / "tensord-bench-XXXXXX").string();
  if (::mkdtemp(folder.data()) == nullptr) return tl::unexpected(base::errno_error("make " + folder, errno));
  ::setenv("TENSORD_RUNTIME_DIR", (folder + "/run").c_str(), 1);
  ::setenv("TENSORD_STATE_DIR", (folder + "/state").c_str(), 1);
  ::setenv("XDG_CONFIG_HOME", folder.c_str(), 1);  // nobody's settings but the defaults
  ::unsetenv("TENSORD_CONFIG");
  const std::string log = folder + "/log";
  const pid_t child = ::fork();
  if (child < 0) return tl::unexpected(base::errno_error("start the daemon", errno));
  if (child == 0) become_daemon(options.binary, log);
  Daemon daemon(child, folder);
  for (const int64_t begin_ns = base::monotonic_ns(); base::monotonic_ns() - begin_ns < kDeadlineNs;) {
    if (client::Connection::open(client::Autostart::no)) return daemon;
    int status = 0;
    if (::waitpid(child, &status, WNOHANG) == child) {
      daemon.pid_ = -1;
      break;
    }
    std::this_thread::sleep_for(kPause);
  }
  return base::fail(Code::unavailable, base::text("start ", options.binary, ": it does not listen; ", last_line(log)));
}

Daemon::~Daemon() {
  if (pid_ > 0) {
    ::kill(pid_, SIGTERM);
    ::waitpid(pid_, nullptr, 0);
  }
  std::error_code ignored;
  if (!folder_.empty()) std::filesystem::remove_all(folder_, ignored);
}

Result<nlohmann::json> Daemon::ask(protocol::Verb verb, const std::string& selector) const {
  TRY_ASSIGN(const std::string text, client::call(verb, selector, client::Autostart::no));
  nlohmann::json answer = nlohmann::json::parse(text, nullptr, false);
  if (answer.is_discarded()) return base::fail(Code::corrupt, "the daemon's answer is no JSON");
  return answer;
}

int Daemon::read_thread_count() const {
  const auto status = ask(protocol::Verb::status, "");
  return status ? status->at("limits").at("read_threads").get<int>() : 1;
}

Result<std::string> Daemon::replica_of(const std::string& path) const {
  TRY_ASSIGN(const nlohmann::json listed, ask(protocol::Verb::list, ""));
  std::string newest;
  for (const auto& replica : listed.at("replicas")) {
    const bool is_meant = replica.at("path") == path && replica.at("device").is_null();
    if (is_meant) newest = std::to_string(replica.at("replica").get<uint64_t>());
  }
  if (newest.empty()) return base::fail(Code::not_found, "no replica of " + path);
  return newest;
}

Status Daemon::evict(const std::string& path) const {
  const int64_t begin_ns = base::monotonic_ns();
  while (true) {
    const auto replica = replica_of(path);
    const auto evicted = replica ? ask(protocol::Verb::evict, *replica) : base::pass_on(replica);
    if (evicted || evicted.error().code == Code::not_found) return {};
    if (evicted.error().code != Code::unavailable || base::monotonic_ns() - begin_ns > kDeadlineNs) {
      return base::pass_on(evicted);
    }
    std::this_thread::sleep_for(kPause);
  }
}

Result<std::shared_ptr<client::Model>> open_ready(const std::string& path) {
  TRY_ASSIGN(std::shared_ptr<client::Model> model, client::Model::open({path}, {.autostart = client::Autostart::no}));
  TRY(model->wait(nullptr, -1));
  return model;
}

Result<Clients> Clients::start(int count, const std::function<Status(int number)>& work) {
  std::fflush(nullptr);
  Clients clients;
  for (int number = 0; number < count; ++number) {
    const pid_t child = ::fork();
    if (child < 0) return tl::unexpected(base::errno_error("start a client", errno));
    if (child == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      const Status done = work(number);
      if (!done) std::fprintf(stderr, "client %d: %s\n", number, done.error().message.c_str());
      std::fflush(nullptr);
      ::_exit(done ? 0 : 1);
    }
    clients.children_.push_back(child);
  }
  return clients;
}

Clients::~Clients() {
  for (const pid_t child : children_) {
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
  }
}

Status Clients::wait() {
  int failed_count = 0;
  const auto children = std::exchange(children_, {});
  for (const pid_t child : children) {
    int status = 0;
    ::waitpid(child, &status, 0);
    failed_count += status != 0;
  }
  if (failed_count == 0) return {};
  return base::fail(Code::internal, base::text(failed_count, " of ", children.size(), " clients failed"));
}

Status run_clients(int count, const std::function<Status(int number)>& work) {
  TRY_ASSIGN(Clients clients, Clients::start(count, work));
  return clients.wait();
}

void make_barrier(pthread_barrier_t& barrier, int process_count) {
  pthread_barrierattr_t attributes;
  ::pthread_barrierattr_init(&attributes);
  ::pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  ::pthread_barrier_init(&barrier, &attributes, static_cast<unsigned>(process_count));
}

void touch_free_memory(uint64_t size_bytes) {
  void* data = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (data != MAP_FAILED) ::munmap(data, size_bytes);
}

Result<memory::Mapped> share_memory(uint64_t size_bytes) {
  void* data = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return tl::unexpected(base::errno_error("share memory", errno));
  return memory::Mapped(static_cast<std::byte*>(data), size_bytes);
}

namespace {
// The number behind "FIELD:" in a file of /proc; 0 when it cannot be read.
uint64_t number_in(const std::string& path, const std::string& field) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(field + ":")) return std::strtoull(line.c_str() + field.size() + 1, nullptr, 10);
  }
  return 0;
}
}  // namespace

uint64_t process_bytes(pid_t pid, const std::string& field) {
  return number_in(base::text("/proc/", pid, "/status"), field) * 1024;
}

uint64_t shared_bytes(pid_t pid) { return number_in(base::text("/proc/", pid, "/smaps_rollup"), "Pss") * 1024; }

uint64_t available_bytes() { return number_in("/proc/meminfo", "MemAvailable") * 1024; }

uint64_t Daemon::disk_bytes() const { return number_in(base::text("/proc/", pid_, "/io"), "read_bytes"); }

nlohmann::json Daemon::environment() const {
  return {{"TENSORD_RUNTIME_DIR", folder_ + "/run"}, {"TENSORD_AUTOSTART", "0"}};
}

uint64_t fault_count(pid_t pid) {
  std::ifstream file(base::text("/proc/", pid, "/stat"));
  std::string line;
  std::getline(file, line);
  // proc(5): after "pid (name) state" come ppid, pgrp, sid, tty, tpgid, flags minflt cminflt majflt.
  std::istringstream rest(line.substr(line.rfind(')') + 2));
  std::string word;
  uint64_t faults = 0;
  constexpr int kMinor = 7, kMajor = 9;
  for (int at = 0; rest >> word && at <= kMajor; ++at) {
    if (at == kMinor || at == kMajor) faults += std::strtoull(word.c_str(), nullptr, 10);
  }
  return faults;
}

}  // namespace tensord::bench
