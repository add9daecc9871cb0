// Frames: how messages and descriptors cross a Unix stream socket.
//
//   [u32 magic][u32 size_bytes][u32 fd_count][u32 zero] [size_bytes of FlatBuffers payload]      little-endian
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

inline constexpr uint32_t kFrameMagic = 0x31445354;          // "TSD1"
inline constexpr uint32_t kFrameBytesMax = 64 << 20;         // spans of a traced load are the largest
inline constexpr uint32_t kFrameFdsMax = 2048;               // 2 TiB in segments of 1 GiB
inline constexpr size_t kFdsPerMessage = 250;                // below the kernel's SCM_MAX_FD, 253

struct Frame {
  std::vector<std::byte> bytes;
  std::vector<base::Fd> fds;
};

// Puts frames together from what a non-blocking socket has. Not thread safe.
class FrameReader {
 public:
  // Reads what is there and returns the next whole frame, or nullopt when more bytes are needed. Code::corrupt for a
  // wrong magic, sizes over the limits or a wrong number of descriptors; Code::unavailable when the other side is
  // gone. After an error the connection is to be closed.
  Result<std::optional<Frame>> read_from(int socket);

  // True while a frame has begun and is not whole: the owner sets a deadline.
  bool is_partial() const;

 private:
  std::vector<std::byte> buffer_;
  std::vector<base::Fd> fds_;
};

// Frames on their way out of a non-blocking socket. Not thread safe.
class FrameWriter {
 public:
  void push(Frame frame);
  // Writes what fits. True when everything is out.
  Result<bool> write_to(int socket);
  bool empty() const { return frames_.empty(); }
  size_t pending_bytes() const;

 private:
  std::deque<Frame> frames_;
  size_t sent_bytes_ = 0;   // of the first frame, header included
  size_t sent_fds_ = 0;
};

// For clients: whole frames with a deadline (Code::unavailable when it passes). The socket is non-blocking.
Status send_frame(int socket, Frame frame, int64_t timeout_ms);
Result<Frame> receive_frame(int socket, FrameReader& reader, int64_t timeout_ms);

}  // namespace tensord::rpc
