// File descriptors with an owner, and the few calls on them that everyone needs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include "base/result.h"

namespace tensord::base {

// Owns one descriptor; closes it when it goes. Not thread safe.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    if (this != &other) reset(std::exchange(other.fd_, -1));
    return *this;
  }
  ~Fd() { reset(); }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  int release() { return std::exchange(fd_, -1); }
  void reset(int fd = -1);

 private:
  int fd_ = -1;
};

struct Pipe {
  Fd read_end;
  Fd write_end;
};

// Both ends close-on-exec and non-blocking.
Result<Pipe> make_pipe();

// A descriptor of its own for the same open file, close-on-exec.
Result<Fd> duplicate(int fd);

// Fills `target` from `offset`; EINTR and short reads are retried. End of file before the span is full is
// Code::corrupt. `what` names the file in messages.
Status read_exactly(int fd, uint64_t offset, std::span<std::byte> target, const std::string& what);

// The whole of a regular file of at most `size_bytes_max`, Code::invalid_argument when it is larger.
Result<std::string> read_file(int fd, uint64_t size_bytes_max, const std::string& what);

// Which file lies behind a descriptor, and whether it is still the one it was.
struct FileIdentity {
  uint64_t device = 0;
  uint64_t inode = 0;
  uint64_t size_bytes = 0;
  int64_t mtime_ns = 0;
  auto operator<=>(const FileIdentity&) const = default;
};

// Code::invalid_argument unless a regular file lies behind `fd`. `what` names it in messages.
Result<FileIdentity> identify_file(int fd, const std::string& what);

// Code::changed, saying what changed, when the file behind `fd` has another size or mtime than `expected`, or no
// name any more (deleted, or replaced by rename).
Status check_unchanged(int fd, const FileIdentity& expected, const std::string& what);

}  // namespace tensord::base
