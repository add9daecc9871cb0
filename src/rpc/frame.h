// Frames: how messages and descriptors cross a Unix stream socket.
//
//   [u32 magic][u32 size_bytes][u32 fd_count][u32 zero] [size_bytes of FlatBuffers payload] little-endian
//   descriptors travel with SCM_RIGHTS on the bytes of their own frame, at most kFdsPerMessage to a sendmsg
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <vector>

#include "base/fd.h"
#include "base/result.h"

namespace tensord::rpc {

using base::Result;
using base::Status;

inline constexpr uint32_t kFrameMagic = 0x31445354;  // "TSD1"
inline constexpr size_t kFrameHeaderBytes = 16;
inline constexpr uint32_t kFrameBytesMax = 64 << 20;  // spans of a traced load are the largest
inline constexpr uint32_t kFrameFdsMax = 2048;        // 1 TiB in segments of 512 MiB
inline constexpr size_t kFdsPerMessage = 250;         // below the kernel's SCM_MAX_FD, 253

struct Frame {
  std::vector<std::byte> bytes;
  std::vector<base::Fd> fds;
};

// The frame's header and bytes at the end of `target`, for frames without descriptors.
void append_frame(const Frame& frame, std::vector<std::byte>& target);

// Puts frames together from what a non-blocking socket has. Memory grows with the bytes that came, never with
// what a header announces. After an error the connection is to be closed; all descriptors received so far
// are. Not thread safe.
class FrameReader {
 public:
  // Receives once; nothing there is no error. To be called when next() has nothing more. Code::unavailable
  // when the other side is gone, Code::corrupt when more descriptors came than any frame may have,
  // Code::exhausted when this process has no room for them.
  Status read_from(int socket);

  // The next whole frame out of what was received, or nullopt. Code::corrupt for a wrong magic, sizes over
  // the limits or a wrong number of descriptors.
  Result<std::optional<Frame>> next();

  // True while a frame has begun and is not whole: the owner sets a deadline.
  bool is_partial() const { return header_.has_value() || begin_ != end_; }

 private:
  struct Header {
    uint32_t size_bytes = 0;
    uint32_t fd_count = 0;
    uint64_t final_position = 0;  // of the stream, one past the frame
  };
  // The kernel ends a read after the bytes that descriptors came with (unix(7), net/unix/af_unix.c), so they
  // belong to the frame of the last byte read.
  struct Arrival {
    uint64_t position = 0;  // of the stream, one past that byte
    base::Fd fd;
  };

  Status parse_header();
  Result<std::vector<base::Fd>> take_fds();

  // What was received and is not taken: [begin_, end_).
  std::vector<std::byte> buffer_;
  size_t begin_ = 0;
  size_t end_ = 0;
  uint64_t received_bytes_ = 0;   // of the stream
  std::optional<Header> header_;  // of the frame that has begun; it is taken
  std::deque<Arrival> arrivals_;
};

// Frames on their way out of a non-blocking socket. Not thread safe.
class FrameWriter {
 public:
  // Within kFrameBytesMax and kFrameFdsMax.
  void push(Frame frame);
  // Writes what fits. True when everything is out. Code::unavailable when the other side is gone.
  Result<bool> write_to(int socket);
  bool empty() const { return frames_.empty(); }
  size_t pending_bytes() const { return pending_bytes_; }
  size_t pending_fds() const { return pending_fds_; }

 private:
  std::deque<Frame> frames_;
  size_t sent_bytes_ = 0;  // of the first frame, header included
  size_t sent_fds_ = 0;
  size_t pending_bytes_ = 0;
  size_t pending_fds_ = 0;  // of frames not fully sent
};

// For clients: whole frames with a deadline (Code::unavailable when it passes). The socket is non-blocking.
Status send_frame(int socket, Frame frame, int64_t timeout_ms);
Result<Frame> receive_frame(int socket, FrameReader& reader, int64_t timeout_ms);

}  // namespace tensord::rpc
