#include "rpc/unix_socket.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "base/folders.h"
#include "base/text.h"

namespace tensord::rpc {

using base::Code;
using base::errno_error;
using base::fail;
using base::Status;
using base::text;

namespace {

Result<sockaddr_un> address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    return fail(Code::invalid_argument, "socket ", path, ": ", path.size(),
                " bytes are too long for a socket's path (at most ", sizeof address.sun_path - 1,
                "); set TENSORD_RUNTIME_DIR to a shorter folder");
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

// The folder itself, never what a link at its place points to.
Status check_no_link(const std::string& folder, const struct stat& status) {
  if (!S_ISLNK(status.st_mode)) return {};
  return fail(Code::denied, "runtime folder ", folder, " is a symbolic link; set TENSORD_RUNTIME_DIR to a folder");
}

std::string without_slashes(std::string folder) {
  while (folder.size() > 1 && folder.back() == '/') folder.pop_back();
  return folder;
}

std::string lock_holder(int lock) {
  char pid[32];
  const ssize_t size_bytes = ::pread(lock, pid, sizeof pid, 0);
  std::string holder(pid, size_bytes > 0 ? static_cast<size_t>(size_bytes) : 0);
  holder = holder.substr(0, holder.find_first_not_of("0123456789"));
  return holder.empty() ? "unknown" : holder;
}

Result<base::Fd> take_lock(const std::string& folder) {
  const std::string path = folder + "/lock";
  base::Fd lock(::open(path.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!lock.valid()) return base::fail_errno(errno, "open ", path);
  if (::flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) return base::fail_errno(errno, "lock ", path);
    return fail(Code::unavailable, "a daemon (pid ", lock_holder(lock.get()), ") already serves ", folder);
  }
  const std::string pid = text(::getpid(), "\n");
  if (::ftruncate(lock.get(), 0) != 0 || ::pwrite(lock.get(), pid.data(), pid.size(), 0) < 0) {
    return base::fail_errno(errno, "write ", path);
  }
  return lock;
}

tl::unexpected<base::Error> not_ours(const std::string& folder, const struct stat& status) {
  return fail(Code::denied, "runtime folder ", folder, " belongs to uid ", status.st_uid, ", not to you (uid ",
              ::geteuid(), "); remove it or set TENSORD_RUNTIME_DIR");
}

Status check_folder_owner(const std::string& socket_path) {
  const std::string folder = without_slashes(socket_path.substr(0, socket_path.rfind('/') + 1));
  struct stat status;
  if (::lstat(folder.c_str(), &status) != 0) {
    if (errno == ENOENT) return fail(Code::unavailable, "no daemon listens at ", socket_path);
    return base::fail_errno(errno, "look at runtime folder ", folder);
  }
  TRY(check_no_link(folder, status));
  if (status.st_uid == ::geteuid() || status.st_uid == 0) return {};
  return not_ours(folder, status);
}

}  // namespace

std::string runtime_folder() {
  const std::string folder = base::environment("TENSORD_RUNTIME_DIR");
  if (!folder.empty()) return without_slashes(folder);
  const std::string home = base::environment("XDG_RUNTIME_DIR");
  return home.empty() ? text("/tmp/tensord-", ::geteuid()) : without_slashes(home) + "/tensord";
}

std::string socket_path(const std::string& folder) { return folder + "/socket"; }

Status prepare_runtime_folder(const std::string& path) {
  const std::string folder = without_slashes(path);
  struct stat status;
  if (::lstat(folder.c_str(), &status) == 0) TRY(check_no_link(folder, status));
  TRY(base::make_folders(folder));
  const base::Fd fd(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!fd.valid() || ::fstat(fd.get(), &status) != 0) return base::fail_errno(errno, "open runtime folder ", folder);
  if (status.st_uid != ::geteuid()) return not_ours(folder, status);
  // Not closed by us: as root it may be a mistyped /tmp, and everybody else would be locked out of it.
  if ((status.st_mode & 077) != 0) {
    return fail(Code::denied, "runtime folder ", folder, " is open to others; `chmod 700` it, or set ",
                "TENSORD_RUNTIME_DIR to a folder of its own");
  }
  return {};
}

Result<Listener> Listener::open(const std::string& runtime_folder) {
  const std::string folder = without_slashes(runtime_folder);
  TRY_ASSIGN(const sockaddr_un address, address_of(socket_path(folder)));
  TRY(prepare_runtime_folder(folder));
  Listener listener;
  TRY_ASSIGN(listener.lock_, take_lock(folder));
  listener.path_ = socket_path(folder);
  if (::unlink(listener.path_.c_str()) != 0 && errno != ENOENT) {
    return base::fail_errno(errno, "remove the old socket ", listener.path_);
  }
  base::Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  // Linux gives the file the mode of the unbound socket (unix_bind in net/unix/af_unix.c): it is never open
  // to others, and the process-wide umask stays alone.
  if (!socket.valid() || ::fchmod(socket.get(), 0600) != 0 ||
      ::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    return base::fail_errno(errno, "make socket ", listener.path_);
  }
  listener.socket_ = std::move(socket);
  if (::chmod(listener.path_.c_str(), 0600) != 0 || ::listen(listener.socket_.get(), SOMAXCONN) != 0) {
    return base::fail_errno(errno, "listen at ", listener.path_);
  }
  return listener;
}

void Listener::close_socket() {
  if (!socket_.valid()) return;
  ::unlink(path_.c_str());
  socket_.reset();
}

Result<base::Fd> connect_socket(const std::string& path, int64_t timeout_ms) {
  TRY_ASSIGN(const sockaddr_un address, address_of(path));
  TRY(check_folder_owner(path));
  base::Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket.valid()) return base::fail_errno(errno, "make a socket");
  // Blocking with a limit: a non-blocking connect would fail at once while many clients wait to be accepted.
  const timeval limit{timeout_ms / 1000, timeout_ms % 1000 * 1000};
  ::setsockopt(socket.get(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  int failed;
  do {
    failed = ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
  } while (failed != 0 && errno == EINTR);
  if (failed != 0 && (errno == ENOENT || errno == ECONNREFUSED)) {
    return fail(Code::unavailable, "no daemon listens at ", path);
  }
  if (failed != 0 && errno == EAGAIN) return fail(Code::unavailable, "the daemon at ", path, " does not accept");
  if (failed != 0) return base::fail_errno(errno, "connect to ", path);
  TRY_ASSIGN(const Peer peer, peer_of(socket.get()));
  if (peer.user_id != ::geteuid() && peer.user_id != 0) {
    return fail(Code::denied, "the process ", peer.process_id, " at ", path, " belongs to uid ", peer.user_id,
                ", not to you (uid ", ::geteuid(), ") or root");
  }
  if (::fcntl(socket.get(), F_SETFL, O_NONBLOCK) != 0) return base::fail_errno(errno, "set up a socket");
  return socket;
}

Result<Peer> peer_of(int socket) {
  ucred credentials;
  socklen_t size_bytes = sizeof credentials;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size_bytes) != 0) {
    return base::fail_errno(errno, "ask who is at the other end");
  }
  return Peer{credentials.pid, credentials.uid};
}

}  // namespace tensord::rpc
