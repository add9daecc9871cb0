#include "base/fd.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

namespace tensord::base {

void Fd::reset(int fd) {
  if (fd_ >= 0) ::close(fd_);
  fd_ = fd;
}

Result<Pipe> make_pipe() {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return fail_errno(errno, "make a pipe");
  return Pipe{Fd(ends[0]), Fd(ends[1])};
}

Result<Fd> duplicate(int fd) {
  const int copy = ::fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (copy < 0) return fail_errno(errno, "duplicate a descriptor");
  return Fd(copy);
}

Status read_exactly(int fd, uint64_t offset, std::span<std::byte> target, const std::string& what) {
  size_t done = 0;
  while (done < target.size()) {
    const ssize_t got = ::pread(fd, target.data() + done, target.size() - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return fail_errno(errno, "read ", what, " at ", offset + done);
    if (got == 0) {
      return fail(Code::corrupt, "read ", what, " at ", offset + done, ": the file ends ", target.size() - done,
                  " bytes early");
    }
    done += static_cast<size_t>(got);
  }
  return {};
}

Result<std::string> read_file(int fd, uint64_t size_bytes_max, const std::string& what) {
  TRY_ASSIGN(const FileIdentity identity, identify_file(fd, what));
  if (identity.size_bytes > size_bytes_max) {
    return fail(Code::invalid_argument, "read ", what, ": ", identity.size_bytes, " bytes, at most ", size_bytes_max,
                " are allowed");
  }
  std::string text(identity.size_bytes, '\0');
  TRY(read_exactly(fd, 0, std::as_writable_bytes(std::span(text)), what));
  return text;
}

namespace {
int64_t mtime_of(const struct stat& status) {
  return static_cast<int64_t>(status.st_mtim.tv_sec) * 1'000'000'000 + status.st_mtim.tv_nsec;
}

const char* kind_of(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a FIFO";
  if (S_ISCHR(mode) || S_ISBLK(mode)) return "a device";
  if (S_ISSOCK(mode)) return "a socket";
  return "no regular file";
}
}  // namespace

Result<FileIdentity> identify_file(int fd, const std::string& what) {
  struct stat status;
  if (::fstat(fd, &status) != 0) return fail_errno(errno, "stat ", what);
  if (!S_ISREG(status.st_mode)) {
    return fail(Code::invalid_argument, what, " is ", kind_of(status.st_mode), ", a regular file is needed");
  }
  return FileIdentity{status.st_dev, status.st_ino, static_cast<uint64_t>(status.st_size), mtime_of(status)};
}

Status check_unchanged(int fd, const FileIdentity& expected, const std::string& what) {
  struct stat status;
  if (::fstat(fd, &status) != 0) return fail_errno(errno, "stat ", what);
  if (static_cast<uint64_t>(status.st_size) != expected.size_bytes) {
    return fail(Code::changed, what, " changed while it was read: ", expected.size_bytes, " bytes became ",
                status.st_size, "; open it again");
  }
  if (mtime_of(status) != expected.mtime_ns) {
    return fail(Code::changed, what, " was written to while it was read; open it again");
  }
  if (status.st_nlink == 0) {
    return fail(Code::changed, what, " was deleted or replaced while it was read; open it again");
  }
  return {};
}

}  // namespace tensord::base
