#include "rpc/messages.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/text.h"
#include "tensor/selection.h"

namespace tensord::rpc {

using base::Code;
using base::fail;
using base::text;

namespace {

constexpr size_t kProcessNameBytesMax = 64;
constexpr size_t kFailureBytesMax = 64 << 10;
constexpr size_t kReportBytesMax = kFrameBytesMax - (4 << 10);  // the rest is more than its tables need
// A root and the table in its union; everything else in these messages is vectors and texts.
constexpr uint32_t kTableDepthMax = 4;
constexpr uint32_t kTableCountMax = 4;

// nullptr when the bytes are no whole message of this kind.
template <typename Root>
const Root* verified(std::span<const std::byte> bytes) {
  flatbuffers::Verifier verifier(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), kTableDepthMax,
                                 kTableCountMax);
  return verifier.VerifyBuffer<Root>(nullptr) ? flatbuffers::GetRoot<Root>(bytes.data()) : nullptr;
}

Frame frame_of(const flatbuffers::FlatBufferBuilder& builder) {
  const std::span bytes = std::as_bytes(std::span(builder.GetBufferPointer(), builder.GetSize()));
  return {{bytes.begin(), bytes.end()}, {}};
}

template <typename Body>
Frame reply_frame(uint64_t request_id, Body body) {
  protocol::ReplyFrameT reply;
  reply.id = request_id;
  reply.reply.Set(std::move(body));
  flatbuffers::FlatBufferBuilder builder;
  builder.Finish(protocol::ReplyFrame::Pack(builder, &reply));
  return frame_of(builder);
}

bool is_short(const flatbuffers::String* words) { return words == nullptr || words->size() <= kTextBytesMax; }

bool texts_are_short(const protocol::RequestFrame& frame) {
  if (const auto* call = frame.request_as_Call()) return is_short(call->selector());
  if (const auto* used = frame.request_as_Used()) return is_short(used->slower_why());
  const auto* open = frame.request_as_Open();
  if (open == nullptr) return true;
  if (open->paths()->size() > kFrameFdsMax || !is_short(open->path()) || !is_short(open->device())) return false;
  for (const auto* path : *open->paths()) {
    if (!is_short(path)) return false;
  }
  if (open->only() == nullptr) return true;
  if (open->only()->size() > tensor::kOnlyCountMax) return false;
  return std::all_of(open->only()->begin(), open->only()->end(), is_short);
}

// The error in a refusal, or our own when the bytes are none.
base::Error error_in(std::span<const std::byte> bytes) {
  const auto* reply = verified<protocol::ReplyFrame>(bytes);
  const protocol::Failure* failure = reply == nullptr ? nullptr : reply->reply_as_Failure();
  if (failure == nullptr) return {Code::corrupt, "the daemon says something unasked instead of serving"};
  return {base::code_from(failure->code()), failure->message()->str()};
}

}  // namespace

Frame hello_frame(const protocol::HelloT& hello) {
  flatbuffers::FlatBufferBuilder builder;
  builder.Finish(protocol::Hello::Pack(builder, &hello));
  return frame_of(builder);
}

Result<protocol::HelloT> parse_hello(const Frame& frame) {
  const auto* root = verified<protocol::Hello>(frame.bytes);
  if (!frame.fds.empty() || root == nullptr) return fail(Code::corrupt, "the first message is no Hello");
  if (!is_short(root->product_version()) || !is_short(root->process_name())) {
    return fail(Code::corrupt, "the texts in a Hello are too long");
  }
  protocol::HelloT hello;
  root->UnPackTo(&hello);
  if (hello.process_name.size() > kProcessNameBytesMax) hello.process_name.resize(kProcessNameBytesMax);
  return hello;
}

Status check_request(std::span<const std::byte> bytes) {
  const auto* request = verified<protocol::RequestFrame>(bytes);
  if (request == nullptr) return fail(Code::corrupt, "a request makes no sense");
  if (!texts_are_short(*request)) return fail(Code::corrupt, "the texts in a request are too long");
  return {};
}

Frame reply_opened(uint64_t request_id, const protocol::OpenedT& opened, const std::vector<int>& fds) {
  if (fds.size() > kFrameFdsMax) {
    return reply_failure(
        request_id, {Code::exhausted, text("the artifact lies in ", fds.size(), " descriptors, at most ", kFrameFdsMax,
                                           " can be handed out")});
  }
  Frame frame = reply_frame(request_id, opened);
  for (const int fd : fds) {
    auto copy = base::duplicate(fd);
    if (!copy) return reply_failure(request_id, {copy.error().code, "hand out memory: " + copy.error().message});
    frame.fds.push_back(std::move(*copy));
  }
  return frame;
}

Frame reply_report(uint64_t request_id, const std::string& json) {
  if (json.size() > kReportBytesMax) {
    return reply_failure(request_id, {Code::exhausted, text("a report of ", json.size(), " bytes, at most ",
                                                            kReportBytesMax, " can be sent")});
  }
  protocol::ReportT report;
  report.json = json;
  return reply_frame(request_id, std::move(report));
}

Frame reply_copied(uint64_t request_id, const protocol::CopiedToDeviceT& copied) {
  return reply_frame(request_id, copied);
}

Frame reply_failure(uint64_t request_id, const base::Error& error) {
  protocol::FailureT failure;
  failure.code = static_cast<uint8_t>(error.code);
  failure.target_dirty = error.target == base::TargetState::dirty;
  failure.message = error.message.substr(0, kFailureBytesMax);
  return reply_frame(request_id, std::move(failure));
}

base::Error version_mismatch(const protocol::HelloT& daemon, const protocol::HelloT& client) {
  return {Code::unsupported,
          text("the daemon speaks protocol ", daemon.protocol_version, " (version ", daemon.product_version,
               "), this client ", client.protocol_version, " (version ", client.product_version, "): ",
               daemon.protocol_version < client.protocol_version ? "restart the daemon with `tensord stop`"
                                                                 : "update the client")};
}

Result<protocol::HelloT> greet(int socket, FrameReader& reader, const std::string& product_version,
                               int64_t timeout_ms) {
  protocol::HelloT client;
  client.protocol_version = kProtocolVersion;
  client.product_version = product_version;
  client.process_id = static_cast<uint32_t>(::getpid());
  client.process_name = program_invocation_short_name;
  // A daemon that refuses may have closed already: its reason is still there to be read.
  const Status sent = send_frame(socket, hello_frame(client), timeout_ms);
  auto answer = receive_frame(socket, reader, timeout_ms);
  if (!answer) return tl::unexpected(sent ? answer.error() : sent.error());
  TRY_ASSIGN(protocol::HelloT daemon, parse_hello(*answer));
  if (daemon.protocol_version != kProtocolVersion) return tl::unexpected(version_mismatch(daemon, client));
  // A refusal comes in the same write as the Hello before it, so that it is here now or never.
  TRY_ASSIGN(const std::optional<Frame> refusal, reader.next());
  if (refusal) return tl::unexpected(error_in(refusal->bytes));
  return daemon;
}

}  // namespace tensord::rpc
