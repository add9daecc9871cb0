// What frames say: building messages, and checking those of others before anyone looks into them.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "protocol/tensord_generated.h"
#include "rpc/frame.h"

namespace tensord::rpc {

// The first number changes with every change that an old reader would misunderstand.
inline constexpr uint32_t kProtocolVersion = 3;

// Every text in a Hello or a request; paths are at most PATH_MAX.
inline constexpr size_t kTextBytesMax = 4096;

Frame hello_frame(const protocol::HelloT& hello);
// Code::corrupt unless the frame is a Hello without descriptors. A longer process name is cut.
Result<protocol::HelloT> parse_hello(const Frame& frame);

// Code::corrupt unless the bytes are a whole RequestFrame (of any kind, unknown ones included) with texts of
// at most kTextBytesMax.
Status check_request(std::span<const std::byte> bytes);

// A reply to build: message bytes and the descriptors that go with it (borrowed by number: duplicated at
// once). What does not fit a frame, or cannot be duplicated, becomes a Failure with Code::exhausted.
Frame reply_opened(uint64_t request_id, const protocol::OpenedT& opened, const std::vector<int>& fds);
Frame reply_report(uint64_t request_id, const std::string& json);
Frame reply_copied(uint64_t request_id, const protocol::CopiedToDeviceT& copied);
Frame reply_failure(uint64_t request_id, const base::Error& error);

// The answer to a client of another version, on both sides in the same words.
base::Error version_mismatch(const protocol::HelloT& daemon, const protocol::HelloT& client);

// The client's half of the first exchange: sends Hello, reads the daemon's. Code::unsupported, naming both
// versions and what to do, when protocol versions differ; Code::denied when the daemon refuses this uid,
// Code::exhausted when it is full.
Result<protocol::HelloT> greet(int socket, FrameReader& reader, const std::string& product_version, int64_t timeout_ms);

}  // namespace tensord::rpc
