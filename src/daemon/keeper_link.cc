#include "daemon/keeper_link.h"

#include <bit>
#include <cstring>

#include "base/clock.h"
#include "base/log.h"
#include "memory/fill_map.h"
#include "protocol/tensord_generated.h"
#include "rpc/index_rows.h"
#include "rpc/unix_socket.h"

namespace tensord::daemon {

using base::Code;
using base::fail;
using base::log;
using base::LogLevel;
using base::Result;
using base::Status;

namespace {

constexpr int64_t kConnectMs = 1;
constexpr int64_t kTakeMs = 5'000;  // in which a keeper gives back all that it has
constexpr int64_t kLookMs = 1'000;
constexpr int64_t kLeaveAloneMs = 60'000;  // one that has not
constexpr size_t kFdsBefore = 2;           // fill map and index, before those of memory

struct Head {
  uint64_t replica = 0;
  uint64_t lease = 0;
};

rpc::Frame frame_of(const Head& head) {
  const auto words = std::as_bytes(std::span(&head, 1));
  return {{words.begin(), words.end()}, {}};
}

// With copies of the descriptors.
template <typename Kept>
Result<rpc::Frame> frame_of(const Head& head, const Kept& kept, const std::vector<int>& fds) {
  flatbuffers::FlatBufferBuilder builder;
  builder.Finish(Kept::TableType::Pack(builder, &kept));
  const auto table = std::as_bytes(std::span(builder.GetBufferPointer(), builder.GetSize()));
  rpc::Frame frame = frame_of(head);
  frame.bytes.insert(frame.bytes.end(), table.begin(), table.end());
  if (frame.bytes.size() > rpc::kFrameBytesMax || fds.size() > rpc::kFrameFdsMax)
    return fail(Code::unsupported, "it is too large for a keeper");
  for (const int fd : fds) {
    TRY_ASSIGN(base::Fd copy, base::duplicate(fd));
    frame.fds.push_back(std::move(copy));
  }
  return frame;
}

template <typename Table>
Result<typename Table::NativeTableType> table_in(const rpc::Frame& frame) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(frame.bytes.data()) + sizeof(Head);
  flatbuffers::Verifier verifier(bytes, frame.bytes.size() - sizeof(Head));
  if (!verifier.VerifyBuffer<Table>(nullptr)) return fail(Code::corrupt, "what a keeper stores is damaged");
  typename Table::NativeTableType kept;
  flatbuffers::GetRoot<Table>(bytes)->UnPackTo(&kept);
  return kept;
}

// Structs of the protocol hold the same bytes as ours.
template <typename To, typename From>
std::vector<To> converted(const std::vector<From>& from) {
  std::vector<To> to;
  for (const From& one : from) to.push_back(std::bit_cast<To>(one));
  return to;
}

Result<rpc::Frame> frame_of(const engine::Replica& replica) {
  const engine::Content& whole = replica.content->whole == nullptr ? *replica.content : *replica.content->whole;
  TRY_ASSIGN(const base::Fd index, rpc::encode_index(whole.index));
  protocol::KeptReplicaT kept;
  std::vector<int> fds{replica.fill->fd(), index.get()};
  for (const memory::Segment& segment : replica.memory.segments) {
    kept.memory_bytes.push_back(segment.size_bytes());
    fds.push_back(segment.fd());
  }
  for (const auto& [fd, size_bytes] : replica.allocations) {
    kept.memory_bytes.push_back(size_bytes);
    fds.push_back(fd.get());
  }
  kept.paths = replica.paths;
  kept.files = converted<protocol::KeptFile>(replica.key.files);
  kept.only = replica.key.only;
  kept.device = replica.key.device;
  kept.owner = replica.owner;
  kept.pinned = replica.pinned;
  kept.artifact = std::make_unique<protocol::KeptDigest>(std::bit_cast<protocol::KeptDigest>(*replica.artifact));
  kept.leaves = converted<protocol::KeptDigest>(replica.leaves);
  return frame_of({.replica = replica.number}, kept, fds);
}

Result<rpc::Frame> frame_of(const Head& head, const engine::Lease& lease) {
  protocol::KeptLeaseT kept;
  kept.process_id = static_cast<uint32_t>(lease.holder.process_id);
  kept.process_name = lease.holder.process_name;
  kept.since_ns = lease.since_ns;
  return frame_of(head, kept, {lease.read_end.get()});
}

// What engine::Engine::adopt() takes. Everything in the table may be false; what it says of memory is checked.
Status adopt(engine::Engine& engine, uint64_t number, rpc::Frame frame) {
  TRY_ASSIGN(protocol::KeptReplicaT kept, table_in<protocol::KeptReplica>(frame));
  if (kept.paths.empty() || kept.paths.size() > engine::kPathCountMax || kept.files.empty() ||
      frame.fds.size() != kFdsBefore + kept.memory_bytes.size())
    return fail(Code::corrupt, "what a keeper stores makes no sense");
  auto replica = std::make_unique<engine::Replica>();
  replica->number = number;
  replica->paths = std::move(kept.paths);
  replica->key = {converted<base::FileIdentity>(kept.files), std::move(kept.only), std::move(kept.device)};
  replica->owner = kept.owner;
  replica->pinned = kept.pinned;
  replica->artifact = std::bit_cast<tensor::Digest>(*kept.artifact);
  replica->leaves = converted<tensor::Digest>(kept.leaves);
  TRY_ASSIGN(const memory::FillView fill, memory::FillView::open(frame.fds[0]));
  if (fill.state() != memory::FillState::ready || fill.artifact_id() != replica->artifact)
    return fail(Code::changed, "its memory has been given up since");
  for (size_t at = 0; at < kept.memory_bytes.size(); ++at)
    replica->allocations.emplace_back(std::move(frame.fds[kFdsBefore + at]), kept.memory_bytes[at]);
  TRY_ASSIGN(const base::FileIdentity index_file, base::identify_file(frame.fds[1].get(), "a kept index"));
  TRY_ASSIGN(tensor::Index index, rpc::decode_index(frame.fds[1], index_file.size_bytes));
  return engine.adopt(std::move(replica), std::move(index));
}

Status adopt_lease(engine::Engine& engine, const Head& head, rpc::Frame frame) {
  TRY_ASSIGN(protocol::KeptLeaseT kept, table_in<protocol::KeptLease>(frame));
  if (frame.fds.size() != 1) return fail(Code::corrupt, "a lease without its descriptor");
  engine::Lease lease{.read_end = std::move(frame.fds[0]), .since_ns = kept.since_ns};
  lease.holder.process_id = static_cast<pid_t>(kept.process_id);
  lease.holder.process_name = std::move(kept.process_name);
  return engine.add_lease(head.replica, head.lease, std::move(lease));
}

}  // namespace

void KeeperLink::start(rpc::Server& server) {
  server_ = &server;
  engine_.use_keeper([this](uint64_t replica, uint64_t lease) { tell(replica, lease); });
  look();
  if (connection_ != 0) {
    const rpc::Loop::TimerId patience = loop_.call_after(kTakeMs, [this] { loop_.stop(); });
    loop_.run();
    loop_.cancel(patience);
    if (!ready_) {
      log(LogLevel::warning, "keeper: the other side does not answer; what it has beyond this is not taken over");
      // It may hold leases on replicas whose numbers nobody here knows.
      engine_.number_from(static_cast<uint64_t>(base::monotonic_ns() / base::kNsPerMs) << 10);
    }
  }
  starting_ = false;
}

Status KeeperLink::connect() {
  TRY_ASSIGN(base::Fd socket, rpc::connect_socket(path_, kConnectMs));
  TRY_ASSIGN(connection_, server_->attach(socket, [this](rpc::Frame frame) { return receive(std::move(frame)); }));
  server_->reply(connection_, frame_of(Head()));
  return {};
}

void KeeperLink::look() {
  const Status connected = connect();
  if (connected) return;
  const std::string& why = connected.error().message;
  if (connected.error().code != Code::unavailable && std::exchange(told_, why) != why)
    log(LogLevel::warning, "keeper: ", why);
  loop_.call_after(kLookMs, [this] { look(); });
}

void KeeperLink::closed(rpc::ConnectionId connection) {
  if (connection != connection_) return;
  connection_ = 0;
  loop_.call_after(std::exchange(ready_, false) ? kLookMs : kLeaveAloneMs, [this] { look(); });
  if (starting_) loop_.stop();
}

Status KeeperLink::receive(rpc::Frame frame) {
  Head head;
  if (frame.bytes.size() < sizeof head) return fail(Code::corrupt, "a frame of ", frame.bytes.size(), " bytes");
  std::memcpy(&head, frame.bytes.data(), sizeof head);
  if (ready_) return {};  // it has nothing more to say
  if (head.replica == 0) {
    ready_ = true;
    log(LogLevel::info, "keeper: it stores what is ready");
    for (const auto& [number, replica] : engine_.replicas()) tell(number, 0);
    if (starting_) loop_.stop();
    return {};
  }
  if (starting_) {
    if (head.replica >= UINT64_MAX / 2 || head.lease >= UINT64_MAX / 2)
      return fail(Code::corrupt, "these are not frames of a keeper");
    engine_.number_from(head.replica + 1);
    const Status adopted =
        head.lease == 0 ? adopt(engine_, head.replica, std::move(frame)) : adopt_lease(engine_, head, std::move(frame));
    if (adopted) return {};
    log(LogLevel::info, "keeper: replica ", head.replica, " is not taken over: ", adopted.error().message);
  }
  server_->reply(connection_, frame_of(head));
  return {};
}

// What there is now of a replica with its leases, or of one lease. What goes with its last lease is not worth it.
void KeeperLink::tell(uint64_t number, uint64_t lease) {
  const Head head{number, lease};
  const auto found = engine_.replicas().find(number);
  if (found == engine_.replicas().end()) return server_->reply(connection_, frame_of(head));
  const engine::Replica& replica = *found->second;
  if (replica.state != engine::ReplicaState::ready || !replica.stays) return;
  const auto held = replica.leases.find(lease);
  if (lease != 0 && held == replica.leases.end()) return server_->reply(connection_, frame_of(head));
  if (!ready_) return;  // what is gone goes at any time
  auto frame = lease == 0 ? frame_of(replica) : frame_of(head, held->second);
  if (!frame) return log(LogLevel::warning, "keeper: replica ", number, " is not kept: ", frame.error().message);
  server_->reply(connection_, std::move(*frame));
  if (lease != 0) return;
  for (const auto& [each, _] : replica.leases) tell(number, each);
}

}  // namespace tensord::daemon
