#include "client/autostart.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <ranges>
#include <vector>

#include "base/clock.h"
#include "base/fd.h"
#include "base/folders.h"
#include "base/text.h"
#include "rpc/unix_socket.h"

extern char** environ;

namespace tensord::client {

using base::Code;
using base::fail;

namespace {

// Anything inside this library: dladdr then names the library's file.
void anchor() {}

std::string own_folder() {
  Dl_info info;
  if (::dladdr(reinterpret_cast<void*>(&anchor), &info) == 0 || info.dli_fname == nullptr) return "";
  char* resolved = ::realpath(info.dli_fname, nullptr);
  if (resolved == nullptr) return "";
  std::string path = resolved;
  std::free(resolved);
  return path.substr(0, path.rfind('/'));
}

bool is_program(const std::string& path) { return ::access(path.c_str(), X_OK) == 0; }

base::Result<std::string> find_binary() {
  if (const char* named = std::getenv("TENSORD_BINARY"); named != nullptr && *named != '\0') {
    if (is_program(named)) return std::string(named);
    return fail(Code::unavailable, "$TENSORD_BINARY names ", named, ", which cannot be run");
  }
  const std::string folder = own_folder();
  std::vector<std::string> tried = {folder + "/tensord", folder + "/bin/tensord"};
  const std::string path = base::environment("PATH");
  for (const auto& part : std::views::split(path, ':'))
    tried.push_back(std::string(part.begin(), part.end()) + "/tensord");
  const auto found = std::find_if(tried.begin(), tried.end(), is_program);
  if (found != tried.end()) return *found;
  return fail(Code::unavailable, "no daemon runs, and no `tensord` program was found beside " + folder +
                                     " or on $PATH to start one; set $TENSORD_BINARY");
}

// Where the daemon's early complaints and its log go.
struct Log {
  base::Fd fd;
  std::string path;
};

// In the first of the two folders that takes a file; nowhere when neither does (a full disk is no reason not to serve).
Log open_log(const std::string& state_folder, const std::string& runtime_folder) {
  for (const std::string& folder : {state_folder, runtime_folder}) {
    if (!base::make_folders(folder)) continue;
    std::string path = folder + "/daemon.log";
    base::Fd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
    if (fd.valid()) return {std::move(fd), std::move(path)};
  }
  return {base::Fd(::open("/dev/null", O_WRONLY | O_CLOEXEC)), ""};
}

off_t size_of(const Log& log) { return ::lseek(log.fd.get(), 0, SEEK_END); }

// Why it ended, as the last line of what it wrote behind `begin` says, and where there may be more.
std::string reason_in(const Log& log, off_t begin) {
  char tail[1024];
  const ssize_t got =
      ::pread(log.fd.get(), tail, sizeof tail, std::max(begin, size_of(log) - static_cast<off_t>(sizeof tail)));
  std::string text(tail, got > 0 ? static_cast<size_t>(got) : 0);
  while (text.ends_with('\n')) text.pop_back();
  text = text.substr(text.rfind('\n') + 1);
  if (text.empty()) text = "it does not say why";
  return log.path.empty() ? text : base::text(text, "; its log is ", log.path);
}

// The daemon detaches from this process by itself (--detach), so that no child is left to be waited for later, and gets
// none of our descriptors: whoever waits for one of them to be closed would wait for the daemon.
base::Status spawn(const std::string& binary, const Log& log) {
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, log.fd.get(), 1);
  ::posix_spawn_file_actions_adddup2(&actions, 1, 2);
  ::posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);  // last: the log may be 0 here
  ::posix_spawn_file_actions_addclosefrom_np(&actions, 3);
  std::vector<std::string> arguments = {binary, "serve", "--detach"};
  const char* own_choice = std::getenv("TENSORD_LOG_FILE");
  if (!log.path.empty() && (own_choice == nullptr || *own_choice == '\0')) {
    // Rotated by the daemon. What it writes to standard error goes there too: both append.
    arguments.insert(arguments.end(), {"--log-file", log.path});
  }
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  const off_t log_begin = size_of(log);
  pid_t child = 0;
  const int problem = ::posix_spawn(&child, binary.c_str(), &actions, nullptr, argv.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (problem != 0) return base::fail_errno(problem, "run ", binary);
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return {};
  return fail(Code::unavailable, "`", binary, " serve` did not start: ", reason_in(log, log_begin));
}

}  // namespace

base::Status start_daemon(const std::string& runtime_folder, int64_t timeout_ms) {
  constexpr int64_t kSpawnAgainMs = 500;
  TRY(rpc::prepare_runtime_folder(runtime_folder));
  TRY_ASSIGN(const std::string binary, find_binary());
  const Log log = open_log(base::state_folder(), runtime_folder);
  const off_t log_begin = size_of(log);
  const int64_t begin_ns = base::monotonic_ns();
  int64_t spawned_ms = -kSpawnAgainMs;
  for (;;) {
    const int64_t waited_ms = (base::monotonic_ns() - begin_ns) / 1'000'000;
    // Again and again: an earlier daemon may hold the lock for as long as it drains. A second one at once is harmless.
    if (waited_ms - spawned_ms >= kSpawnAgainMs) {
      TRY(spawn(binary, log));
      spawned_ms = waited_ms;
    }
    const auto socket = rpc::connect_socket(rpc::socket_path(runtime_folder));
    if (socket) return {};
    if (socket.error().code != Code::unavailable) return base::pass_on(socket);
    if (waited_ms > timeout_ms) {
      return fail(Code::unavailable, "started ", binary, ", but it does not listen after ", timeout_ms,
                  " ms: ", reason_in(log, log_begin));
    }
    ::poll(nullptr, 0, 5);
  }
}

}  // namespace tensord::client
