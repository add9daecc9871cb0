// What the tests of this folder share.
#pragma once

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/fd.h"
#include "rpc/frame.h"

namespace tensord::rpc {

inline std::pair<base::Fd, base::Fd> socket_pair() {
  int ends[2];
  CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0);
  return {base::Fd(ends[0]), base::Fd(ends[1])};
}

inline std::vector<std::byte> bytes_of(std::string_view words) {
  const auto bytes = std::as_bytes(std::span(words));
  return {bytes.begin(), bytes.end()};
}

// One message with `count` copies of `fd` on `bytes`.
inline void send_fds(int socket, const std::vector<std::byte>& bytes, int fd, size_t count) {
  std::vector<char> control(CMSG_SPACE(sizeof(int) * count));
  iovec data{const_cast<std::byte*>(bytes.data()), bytes.size()};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (count > 0) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* part = CMSG_FIRSTHDR(&message);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(sizeof(int) * count);
    for (size_t at = 0; at < count; ++at) std::memcpy(CMSG_DATA(part) + at * sizeof(int), &fd, sizeof fd);
  }
  CHECK(::sendmsg(socket, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size()));
}

inline uint64_t inode_of(int fd) {
  struct stat status;
  CHECK(::fstat(fd, &status) == 0);
  return status.st_ino;
}

// Is the write end of a pipe still open anywhere? Its read end tells.
inline bool write_end_is_closed(const base::Pipe& pipe) {
  char byte;
  return ::read(pipe.read_end.get(), &byte, 1) == 0;
}

// A folder of its own, removed with what is in it.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    path_ = (std::filesystem::temp_directory_path() / "tensord-rpc-XXXXXX").string();
    CHECK(::mkdtemp(path_.data()) != nullptr);
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Leaves this process no descriptor to open as long as it lives.
class NoDescriptorsLeft {
 public:
  NoDescriptorsLeft() {
    CHECK(::getrlimit(RLIMIT_NOFILE, &before_) == 0);
    taken_.emplace_back(::open("/dev/null", O_RDONLY | O_CLOEXEC));  // the lowest free number
    rlimit lower = before_;
    lower.rlim_cur = static_cast<rlim_t>(taken_.back().get()) + 1;
    CHECK(::setrlimit(RLIMIT_NOFILE, &lower) == 0);
  }
  ~NoDescriptorsLeft() { ::setrlimit(RLIMIT_NOFILE, &before_); }
  void give_one_back() { taken_.pop_back(); }

 private:
  rlimit before_{};
  std::vector<base::Fd> taken_;
};

}  // namespace tensord::rpc
