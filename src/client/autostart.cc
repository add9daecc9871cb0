#include "client/autostart.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
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
    return fail(Code::unavailable, base::text("$TENSORD_BINARY names ", named, ", which cannot be run"));
  }
  const std::string folder = own_folder();
  std::vector<std::string> tried = {folder + "/tensord", folder + "/../../../../bin/tensord"};
  if (const char* path = std::getenv("PATH")) {
    std::string_view rest = path;
    while (!rest.empty()) {
      const size_t colon = rest.find(':');
      tried.push_back(std::string(rest.substr(0, colon)) + "/tensord");
      rest = colon == std::string_view::npos ? "" : rest.substr(colon + 1);
    }
  }
  for (const std::string& path : tried) {
    if (is_program(path)) return path;
  }
  return fail(Code::unavailable, "no daemon runs, and no `tensord` program was found beside " + folder +
                                     " or on $PATH to start one; set $TENSORD_BINARY");
}

// The daemon detaches from this process by itself (--detach), so that no child is left to be waited for later.
base::Status spawn(const std::string& binary, const std::string& log_path) {
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  ::posix_spawn_file_actions_addopen(&actions, 1, log_path.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
  ::posix_spawn_file_actions_adddup2(&actions, 1, 2);
  std::string arguments[] = {binary, "serve", "--detach"};
  char* argv[] = {arguments[0].data(), arguments[1].data(), arguments[2].data(), nullptr};
  pid_t child = 0;
  const int problem = ::posix_spawn(&child, binary.c_str(), &actions, nullptr, argv, environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (problem != 0) return tl::unexpected(base::errno_error("run " + binary, problem));
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return {};
}

}  // namespace

base::Status start_daemon(const std::string& runtime_folder, int64_t timeout_ms) {
  TRY(rpc::prepare_runtime_folder(runtime_folder));
  TRY_ASSIGN(const std::string binary, find_binary());
  const std::string folder = base::state_folder();
  const bool writable =
      base::make_folders(folder) && ::access(folder.c_str(), W_OK) == 0;  // else a read-only home
  const std::string log_path = (writable ? folder : runtime_folder) + "/daemon.log";
  const int64_t deadline_ns = base::monotonic_ns() + timeout_ms * 1'000'000;
  TRY(spawn(binary, log_path));
  for (;;) {
    const auto socket = rpc::connect_socket(rpc::socket_path(runtime_folder));
    if (socket) return {};
    if (socket.error().code != Code::unavailable) return base::pass_on(socket);
    if (base::monotonic_ns() > deadline_ns) {
      return fail(Code::unavailable, base::text("started ", binary, ", but it does not listen after ",
                                                timeout_ms, " ms; its log is ", log_path));
    }
    ::poll(nullptr, 0, 5);
  }
}

}  // namespace tensord::client
