// Input: how many bytes go with a send, less one; on which send a descriptor rides (none when there is no
// such send); the rest is what a client sends.
#include <algorithm>

#include "base/check.h"
#include "rpc/messages.h"
#include "rpc/rpc_testing.h"

using namespace tensord;
using namespace tensord::rpc;

namespace {

// Looks at everything in what was accepted.
void look_into(const Frame& frame) {
  CHECK(frame.bytes.size() <= kFrameBytesMax && frame.fds.size() <= kFrameFdsMax);
  for (const base::Fd& fd : frame.fds) CHECK(fd.valid());
  if (const auto hello = parse_hello(frame)) CHECK(hello->product_version.size() <= kTextBytesMax);
  if (check_request(frame.bytes)) {
    protocol::RequestFrameT request;
    flatbuffers::GetRoot<protocol::RequestFrame>(frame.bytes.data())->UnPackTo(&request);
    if (const auto* open = request.request.AsOpen()) CHECK(open->paths.size() <= kFrameFdsMax);
  }
}

// False when the connection is to be closed.
bool read_frames(FrameReader& reader, int socket) {
  if (!reader.read_from(socket)) return false;
  for (;;) {
    const auto frame = reader.next();
    if (!frame) return false;
    if (!*frame) return true;
    look_into(**frame);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size_bytes) {
  if (size_bytes < 2) return 0;
  const size_t send_bytes = size_t{data[0]} + 1;
  const size_t send_with_fd = data[1];
  std::span rest(data + 2, size_bytes - 2);
  look_into({{std::as_bytes(rest).begin(), std::as_bytes(rest).end()}, {}});

  const auto [near, far] = socket_pair();
  FrameReader reader;
  for (size_t count = 0; !rest.empty(); ++count) {
    const auto part = rest.first(std::min(send_bytes, rest.size()));
    rest = rest.subspan(part.size());
    const auto sent = std::as_bytes(part);
    send_fds(near.get(), {sent.begin(), sent.end()}, near.get(), count == send_with_fd ? 1 : 0);
    if (count % 2 == 0 && !read_frames(reader, far.get())) return 0;
  }
  read_frames(reader, far.get());
  return 0;
}
