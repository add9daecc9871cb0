#include "rpc/frame.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/clock.h"

namespace tensord::rpc {

using base::Code;
using base::fail;

namespace {

// Small frames come whole in one read of this size.
constexpr size_t kReadBytes = 16 << 10;
constexpr size_t kKernelFdsMax = 253;  // SCM_MAX_FD

using HeaderWords = std::array<uint32_t, 4>;
static_assert(sizeof(HeaderWords) == kFrameHeaderBytes);
// All but the last batch of descriptors ride on one byte of the header each.
static_assert(kFrameFdsMax / kFdsPerMessage + 1 <= kFrameHeaderBytes);

tl::unexpected<base::Error> closed_by_peer() { return fail(Code::unavailable, "the other side closed the connection"); }

std::vector<base::Fd> fds_of(msghdr& message) {
  std::vector<base::Fd> fds;
  for (cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr; part = CMSG_NXTHDR(&message, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t at = 0; at < count; ++at) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(part) + at * sizeof(int), sizeof fd);
      fds.emplace_back(fd);
    }
  }
  return fds;
}

Status wait_for(int socket, short events, int64_t deadline_ns, const char* what) {
  for (;;) {
    const int64_t left_ns = std::max<int64_t>(deadline_ns - base::monotonic_ns(), 0);
    pollfd entry{socket, events, 0};
    const int ready = ::poll(&entry, 1, static_cast<int>(std::min<int64_t>(left_ns / 1'000'000 + 1, 1 << 30)));
    if (ready > 0) return {};
    if (ready < 0 && errno != EINTR) return base::fail_errno(errno, "poll the socket");
    if (base::monotonic_ns() >= deadline_ns) return fail(Code::unavailable, what);
  }
}

HeaderWords header_of(const Frame& frame) {
  return {kFrameMagic, static_cast<uint32_t>(frame.bytes.size()), static_cast<uint32_t>(frame.fds.size()), 0};
}

int64_t deadline_after(int64_t timeout_ms) { return base::monotonic_ns() + timeout_ms * 1'000'000; }

}  // namespace

Status FrameReader::read_from(int socket) {
  if (begin_ > 0) {
    std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
    end_ -= std::exchange(begin_, 0);
  }
  if (buffer_.size() - end_ < kReadBytes) {
    // As much again as has come, so that large frames take few reads.
    const size_t left = header_ ? header_->size_bytes - end_ : 0;
    buffer_.resize(end_ + std::max(kReadBytes, std::min(end_, left)));
  }
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kKernelFdsMax)];
  iovec data{buffer_.data() + end_, buffer_.size() - end_};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  ssize_t got;
  do {
    got = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  } while (got < 0 && errno == EINTR);
  if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return {};
  if (got < 0 && errno != ECONNRESET) return base::fail_errno(errno, "receive from the socket");
  if (got <= 0 && is_partial()) return fail(Code::unavailable, "the other side closed in the middle of a frame");
  if (got <= 0) return closed_by_peer();

  received_bytes_ += static_cast<uint64_t>(got);
  for (base::Fd& fd : fds_of(message)) arrivals_.push_back({received_bytes_, std::move(fd)});
  if ((message.msg_flags & MSG_CTRUNC) != 0) {
    arrivals_.clear();
    return fail(Code::exhausted, "descriptors were lost: this process may open no more files (ulimit -n)");
  }
  if (arrivals_.size() > kFrameFdsMax) {
    arrivals_.clear();
    return fail(Code::corrupt, "more than ", kFrameFdsMax, " descriptors came with one frame");
  }
  end_ += static_cast<size_t>(got);
  return {};
}

Status FrameReader::parse_header() {
  HeaderWords words;
  std::memcpy(words.data(), buffer_.data() + begin_, sizeof words);
  const auto [magic, size_bytes, fd_count, zero] = words;
  if (magic != kFrameMagic || zero != 0)
    return fail(Code::corrupt, "these bytes are not a frame of tensord's protocol");
  if (size_bytes > kFrameBytesMax) {
    return fail(Code::corrupt, "a frame of ", size_bytes, " bytes, at most ", kFrameBytesMax, " are allowed");
  }
  if (fd_count > kFrameFdsMax) {
    return fail(Code::corrupt, "a frame of ", fd_count, " descriptors, at most ", kFrameFdsMax, " are allowed");
  }
  header_ = Header{size_bytes, fd_count, received_bytes_ - (end_ - begin_) + kFrameHeaderBytes + size_bytes};
  begin_ += kFrameHeaderBytes;
  return {};
}

Result<std::vector<base::Fd>> FrameReader::take_fds() {
  std::vector<base::Fd> fds;
  while (!arrivals_.empty() && arrivals_.front().position <= header_->final_position) {
    fds.push_back(std::move(arrivals_.front().fd));
    arrivals_.pop_front();
  }
  if (fds.size() == header_->fd_count) return fds;
  return fail(Code::corrupt, "a frame with ", fds.size(), " descriptors, ", header_->fd_count, " were announced");
}

Result<std::optional<Frame>> FrameReader::next() {
  if (!header_) {
    if (end_ - begin_ < kFrameHeaderBytes) return std::nullopt;
    if (Status parsed = parse_header(); !parsed) {
      arrivals_.clear();
      return base::pass_on(parsed);
    }
  }
  if (end_ - begin_ < header_->size_bytes) return std::nullopt;
  auto fds = take_fds();
  if (!fds) {
    arrivals_.clear();
    return base::pass_on(fds);
  }
  const std::byte* const bytes = buffer_.data() + begin_;
  Frame frame{{bytes, bytes + header_->size_bytes}, std::move(*fds)};
  begin_ += header_->size_bytes;
  header_.reset();
  if (begin_ == end_ && buffer_.size() > kReadBytes) buffer_ = {};  // a large frame's room is not kept
  return frame;
}

void append_frame(const Frame& frame, std::vector<std::byte>& target) {
  const HeaderWords words = header_of(frame);
  const auto header = std::as_bytes(std::span(words));
  target.insert(target.end(), header.begin(), header.end());
  target.insert(target.end(), frame.bytes.begin(), frame.bytes.end());
}

void FrameWriter::push(Frame frame) {
  CHECK(frame.bytes.size() <= kFrameBytesMax && frame.fds.size() <= kFrameFdsMax);
  pending_bytes_ += kFrameHeaderBytes + frame.bytes.size();
  pending_fds_ += frame.fds.size();
  frames_.push_back(std::move(frame));
}

Result<bool> FrameWriter::write_to(int socket) {
  while (!frames_.empty()) {
    Frame& frame = frames_.front();
    HeaderWords header = header_of(frame);
    const size_t fd_count = std::min(kFdsPerMessage, frame.fds.size() - sent_fds_);
    const bool last_batch = sent_fds_ + fd_count == frame.fds.size();

    const size_t header_sent = std::min(sent_bytes_, kFrameHeaderBytes);
    const size_t payload_sent = sent_bytes_ - header_sent;
    std::array<iovec, 2> data{
        iovec{reinterpret_cast<std::byte*>(&header) + header_sent, kFrameHeaderBytes - header_sent},
        iovec{frame.bytes.data() + payload_sent, frame.bytes.size() - payload_sent}};
    if (!last_batch) data = {iovec{data[0].iov_base, 1}, iovec{nullptr, 0}};

    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kFdsPerMessage)];
    msghdr message{};
    message.msg_iov = data.data();
    message.msg_iovlen = data.size();
    if (fd_count > 0) {
      message.msg_control = control;
      message.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
      cmsghdr* part = CMSG_FIRSTHDR(&message);
      part->cmsg_level = SOL_SOCKET;
      part->cmsg_type = SCM_RIGHTS;
      part->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
      for (size_t at = 0; at < fd_count; ++at) {
        const int fd = frame.fds[sent_fds_ + at].get();
        std::memcpy(CMSG_DATA(part) + at * sizeof(int), &fd, sizeof fd);
      }
    }
    const ssize_t sent = ::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return false;
    if (sent < 0 && (errno == EPIPE || errno == ECONNRESET)) return closed_by_peer();
    if (sent < 0) return base::fail_errno(errno, "send to the socket");

    sent_bytes_ += static_cast<size_t>(sent);
    sent_fds_ += fd_count;  // all of them are on the first byte
    pending_bytes_ -= static_cast<size_t>(sent);
    if (sent_bytes_ < kFrameHeaderBytes + frame.bytes.size()) continue;
    pending_fds_ -= frame.fds.size();
    frames_.pop_front();
    sent_bytes_ = sent_fds_ = 0;
  }
  return true;
}

Status send_frame(int socket, Frame frame, int64_t timeout_ms) {
  const int64_t deadline_ns = deadline_after(timeout_ms);
  FrameWriter writer;
  writer.push(std::move(frame));
  for (;;) {
    TRY_ASSIGN(const bool done, writer.write_to(socket));
    if (done) return {};
    TRY(wait_for(socket, POLLOUT, deadline_ns, "the other side does not take what is sent to it"));
  }
}

Result<Frame> receive_frame(int socket, FrameReader& reader, int64_t timeout_ms) {
  const int64_t deadline_ns = deadline_after(timeout_ms);
  for (;;) {
    TRY_ASSIGN(std::optional<Frame> frame, reader.next());
    if (frame) return std::move(*frame);
    TRY(wait_for(socket, POLLIN, deadline_ns, "the other side does not answer"));
    TRY(reader.read_from(socket));
  }
}

}  // namespace tensord::rpc
