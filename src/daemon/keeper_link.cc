#include "daemon/keeper_link.h"

#include <sys/epoll.h>

#include <algorithm>
#include <cstring>

#include "base/clock.h"
#include "base/log.h"
#include "base/text.h"
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

constexpr int64_t kTakeMs = 5'000;  // in which a keeper answers, and gives all that it has
constexpr int64_t kLookMs = 1'000;
constexpr int64_t kLeaveAloneMs = 60'000;  // one that does not
constexpr size_t kPendingBytesMax = 64 << 20;
constexpr size_t kFdsBefore = 2;  // fill map and index, before those of memory

// The first two and `end` are between the two processes; the others are stored and given back as they came.
enum class Verb : uint32_t { take = 1, clear = 2, end = 3, put = 4, drop = 5 };
struct Head {
  Verb verb = Verb::take;
  uint32_t zero = 0;
  uint64_t replica = 0;
  uint64_t lease = 0;
};

// Without a table, or with the one that is `built`.
rpc::Frame make_frame(const Head& head, const flatbuffers::FlatBufferBuilder* built = nullptr) {
  rpc::Frame frame;
  const auto words = std::as_bytes(std::span(&head, 1));
  frame.bytes.assign(words.begin(), words.end());
  if (built == nullptr) return frame;
  const auto body = std::as_bytes(std::span(built->GetBufferPointer(), built->GetSize()));
  frame.bytes.insert(frame.bytes.end(), body.begin(), body.end());
  return frame;
}

Result<Head> head_of(const rpc::Frame& frame) {
  Head head;
  if (frame.bytes.size() < sizeof head) return fail(Code::corrupt, "a frame of ", frame.bytes.size(), " bytes");
  std::memcpy(&head, frame.bytes.data(), sizeof head);
  return head;
}

template <typename Table>
Result<const Table*> table_of(const rpc::Frame& frame) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(frame.bytes.data()) + sizeof(Head);
  flatbuffers::Verifier verifier(bytes, frame.bytes.size() - sizeof(Head));
  if (!verifier.VerifyBuffer<Table>(nullptr)) return fail(Code::corrupt, "what a keeper stores is damaged");
  return flatbuffers::GetRoot<Table>(bytes);
}

protocol::KeptDigest kept_digest(const tensor::Digest& digest) {
  protocol::KeptDigest kept;
  std::memcpy(&kept, digest.bytes.data(), sizeof kept);
  return kept;
}
tensor::Digest digest_of(const protocol::KeptDigest& kept) {
  tensor::Digest digest;
  std::memcpy(digest.bytes.data(), &kept, sizeof kept);
  return digest;
}
static_assert(sizeof(protocol::KeptDigest) == sizeof(tensor::Digest));

Status add_fd(rpc::Frame& frame, int fd) {
  TRY_ASSIGN(base::Fd copy, base::duplicate(fd));
  frame.fds.push_back(std::move(copy));
  return {};
}

Result<rpc::Frame> frame_of(const engine::Replica& replica) {
  const engine::Content& whole = replica.content->whole == nullptr ? *replica.content : *replica.content->whole;
  protocol::KeptReplicaT kept;
  kept.paths = replica.paths;
  for (size_t at = 0; at < whole.identities.size(); ++at) {
    const base::FileIdentity& file = whole.identities[at];
    auto& told = kept.files.emplace_back(std::make_unique<protocol::KeptFileT>());
    told->device = file.device;
    told->inode = file.inode;
    told->size_bytes = file.size_bytes;
    told->mtime_ns = file.mtime_ns;
  }
  kept.only = replica.key.only;
  kept.owner = replica.owner;
  kept.device = replica.key.device;
  TRY_ASSIGN(base::Fd index, rpc::encode_index(whole.index));
  for (const memory::Segment& segment : replica.memory.segments) kept.memory_bytes.push_back(segment.size_bytes());
  for (const auto& [fd, size_bytes] : replica.allocations) kept.memory_bytes.push_back(size_bytes);
  kept.artifact = std::make_unique<protocol::KeptDigest>(kept_digest(*replica.artifact));
  for (const tensor::Digest& leaf : replica.leaves) kept.leaves.push_back(kept_digest(leaf));
  kept.pinned = replica.pinned;
  flatbuffers::FlatBufferBuilder builder;
  builder.Finish(protocol::CreateKeptReplica(builder, &kept));
  rpc::Frame frame = make_frame({.verb = Verb::put, .replica = replica.number}, &builder);
  TRY(add_fd(frame, replica.fill->fd()));
  frame.fds.push_back(std::move(index));
  for (const memory::Segment& segment : replica.memory.segments) TRY(add_fd(frame, segment.fd()));
  for (const auto& [fd, size_bytes] : replica.allocations) TRY(add_fd(frame, fd.get()));
  if (frame.bytes.size() > rpc::kFrameBytesMax || frame.fds.size() > rpc::kFrameFdsMax)
    return fail(Code::unsupported, "it is too large for a keeper");
  return frame;
}

Status check(const protocol::KeptReplica& kept, const rpc::Frame& frame) {
  if (kept.paths()->size() == 0 || kept.paths()->size() > engine::kPathCountMax || kept.files()->size() == 0 ||
      frame.fds.size() != kFdsBefore + kept.memory_bytes()->size())
    return fail(Code::corrupt, "what a keeper stores makes no sense");
  TRY_ASSIGN(const memory::FillView fill, memory::FillView::open(frame.fds[0]));
  if (fill.state() != memory::FillState::ready || fill.artifact_id() != digest_of(*kept.artifact()))
    return fail(Code::changed, "its memory has been given up since");
  return {};
}

// What engine::Engine::adopt() takes. Everything in the table may be false; what it says of memory is checked.
Status adopt(engine::Engine& engine, uint64_t number, rpc::Frame frame) {
  TRY_ASSIGN(const protocol::KeptReplica* table, table_of<protocol::KeptReplica>(frame));
  const protocol::KeptReplica& kept = *table;
  TRY(check(kept, frame));
  auto replica = std::make_unique<engine::Replica>();
  replica->number = number;
  for (const auto* path : *kept.paths()) replica->paths.push_back(path->str());
  for (const auto* file : *kept.files())
    replica->key.files.push_back({file->device(), file->inode(), file->size_bytes(), file->mtime_ns()});
  for (const auto* words : *kept.only()) replica->key.only.push_back(words->str());
  replica->key.device = kept.device()->str();
  replica->owner = kept.owner();
  replica->pinned = kept.pinned();
  replica->artifact = digest_of(*kept.artifact());
  for (const protocol::KeptDigest* leaf : *kept.leaves()) replica->leaves.push_back(digest_of(*leaf));
  std::vector<memory::Segment> segments;
  uint64_t memory_bytes = 0;
  for (uint32_t at = 0; at < kept.memory_bytes()->size(); ++at) {
    const uint64_t size_bytes = kept.memory_bytes()->Get(at);
    base::Fd& fd = frame.fds[kFdsBefore + at];
    if (size_bytes > tensor::kIndexBytesMax) return fail(Code::corrupt, "memory of ", size_bytes, " bytes");
    memory_bytes += size_bytes;
    if (!replica->key.device.empty()) {
      replica->allocations.emplace_back(std::move(fd), size_bytes);
      continue;
    }
    TRY_ASSIGN(memory::Segment segment, memory::adopt_segment(std::move(fd), size_bytes));
    segments.push_back(std::move(segment));
  }
  TRY_ASSIGN(const base::FileIdentity index_file, base::identify_file(frame.fds[1].get(), "a kept index"));
  TRY_ASSIGN(tensor::Index index, rpc::decode_index(frame.fds[1], index_file.size_bytes));
  if (index.files.size() != replica->key.files.size()) return fail(Code::corrupt, "its index is of other files");
  TRY_ASSIGN(replica->content,
             engine::content_of(std::move(index), replica->key.files, replica->key.only, memory_bytes));
  const engine::Content& content = *replica->content;
  const bool on_device = !replica->key.device.empty();
  replica->image_bytes = on_device ? tensor::device_windows_of(content.index).image_bytes : content.image_bytes;
  replica->device_bytes = on_device ? memory_bytes : 0;
  if (replica->image_bytes > memory_bytes || (!on_device && replica->leaves.size() != content.layout.leaves.size()))
    return fail(Code::corrupt, "its index is of another replica");
  TRY_ASSIGN(replica->index_fd, rpc::encode_index(content.index));
  return engine.adopt(std::move(replica), std::move(segments));
}

Status adopt_lease(engine::Engine& engine, const Head& head, rpc::Frame frame) {
  TRY_ASSIGN(const protocol::KeptLease* kept, table_of<protocol::KeptLease>(frame));
  const auto replica = engine.replicas().find(head.replica);
  if (frame.fds.size() != 1 || replica == engine.replicas().end())
    return fail(Code::corrupt, "a lease without its replica, or its descriptor");
  engine::Lease lease{.read_end = std::move(frame.fds[0]), .since_ns = kept->since_ns()};
  lease.holder = {.process_id = static_cast<pid_t>(kept->process_id()),
                  .user_id = replica->second->owner,
                  .process_name = kept->process_name()->str()};
  return engine.adopt_lease(head.replica, head.lease, std::move(lease));
}

}  // namespace

void KeeperLink::start() {
  const Status taken = take_over();
  if (!taken && taken.error().code != Code::not_found) {
    log(LogLevel::warning, "keeper: ", taken.error().message, "; what it has beyond this is not taken over");
    // It may hold leases on replicas whose numbers nobody here knows.
    engine_.number_from(static_cast<uint64_t>(base::monotonic_ns() / base::kNsPerMs) << 10);
    close();
  }
  engine_.use_keeper(*this);
  if (taken) tell_all();
  look();
}

// Code::not_found where no keeper is. What cannot be taken over is dropped there.
Status KeeperLink::take_over() {
  auto socket = rpc::connect_socket(path_, 0);
  if (!socket)
    return fail(socket.error().code == Code::unavailable ? Code::not_found : socket.error().code,
                socket.error().message);
  socket_ = std::move(*socket);
  const int64_t deadline_ns = base::monotonic_ns() + kTakeMs * base::kNsPerMs;
  const auto left_ms = [&] { return std::max<int64_t>((deadline_ns - base::monotonic_ns()) / base::kNsPerMs, 0); };
  TRY(rpc::send_frame(socket_.get(), make_frame({.verb = Verb::take}), left_ms()));
  std::vector<Head> refused;
  for (;;) {
    TRY_ASSIGN(rpc::Frame frame, rpc::receive_frame(socket_.get(), reader_, left_ms()));
    TRY_ASSIGN(const Head head, head_of(frame));
    if (head.verb == Verb::end) break;
    if (head.verb != Verb::put || head.replica == 0 || head.replica >= UINT64_MAX / 2 || head.lease >= UINT64_MAX / 2)
      return fail(Code::corrupt, "these are not frames of a keeper");
    engine_.number_from(head.replica + 1);
    const Status adopted =
        head.lease == 0 ? adopt(engine_, head.replica, std::move(frame)) : adopt_lease(engine_, head, std::move(frame));
    if (adopted) continue;
    log(LogLevel::info, "keeper: replica ", head.replica, " is not taken over: ", adopted.error().message);
    refused.push_back({.verb = Verb::drop, .replica = head.replica, .lease = head.lease});
  }
  for (const Head& head : refused) writer_.push(make_frame(head));
  return attend();
}

Status KeeperLink::attend() {
  return loop_.watch(socket_.get(), EPOLLIN, [this](uint32_t events) {
    if ((events & EPOLLOUT) != 0) flush();
    if ((events & ~EPOLLOUT) != 0) receive();
  });
}

void KeeperLink::look() {
  const int64_t now_ns = base::monotonic_ns();
  if (socket_.valid() && !ready_ && now_ns > asked_ns_ + kTakeMs * base::kNsPerMs) {
    log(LogLevel::warning, "keeper: it does not answer; nothing is kept");
    leave_alone_ns_ = now_ns + kLeaveAloneMs * base::kNsPerMs;
    close();
  }
  if (!socket_.valid() && now_ns >= leave_alone_ns_) {
    if (auto socket = rpc::connect_socket(path_, 0)) {
      socket_ = std::move(*socket);
      asked_ns_ = now_ns;
      // Descriptors follow once it has answered: one that sleeps is sent none.
      for (const Verb verb : {Verb::clear, Verb::take}) writer_.push(make_frame({.verb = verb}));
      attend() ? flush() : close();
    }
  }
  loop_.call_after(kLookMs, [this] { look(); });
}

void KeeperLink::receive() {
  if (!socket_.valid()) return;
  if (!reader_.read_from(socket_.get())) return close();
  for (;;) {
    const auto frame = reader_.next();
    if (!frame) return close();
    if (!*frame) return;
    const auto head = head_of(**frame);
    if (ready_ || !head || head->verb != Verb::end) continue;
    tell_all();
  }
}

void KeeperLink::tell_all() {
  ready_ = true;
  log(LogLevel::info, "keeper: it stores what is ready");
  flush();
  engine_.tell_keeper_all();
}

void KeeperLink::send(rpc::Frame frame) {
  if (!ready_) return;
  writer_.push(std::move(frame));
  flush();
}

void KeeperLink::flush() {
  if (!socket_.valid()) return;
  const auto done = writer_.write_to(socket_.get());
  if (!done || writer_.pending_bytes() > kPendingBytesMax || writer_.pending_fds() > 2 * rpc::kFrameFdsMax) {
    log(LogLevel::warning, "keeper: ", done ? "it is too slow" : done.error().message);
    return close();
  }
  loop_.change(socket_.get(), *done ? EPOLLIN : EPOLLIN | EPOLLOUT);
}

void KeeperLink::close() {
  if (socket_.valid()) loop_.unwatch(socket_.get());
  socket_.reset();
  reader_ = {};
  writer_ = {};
  ready_ = false;
}

void KeeperLink::keep(const engine::Replica& replica) {
  if (!ready_) return;
  auto frame = frame_of(replica);
  if (frame) return send(std::move(*frame));
  log(LogLevel::warning, "keeper: replica ", replica.number, " is not kept: ", frame.error().message);
}

void KeeperLink::keep_lease(const engine::Replica& replica, uint64_t lease) {
  const engine::Lease& held = replica.leases.at(lease);
  flatbuffers::FlatBufferBuilder builder;
  builder.Finish(protocol::CreateKeptLeaseDirect(builder, static_cast<uint32_t>(held.holder.process_id),
                                                 held.holder.process_name.c_str(), held.since_ns));
  rpc::Frame frame = make_frame({.verb = Verb::put, .replica = replica.number, .lease = lease}, &builder);
  if (add_fd(frame, held.read_end.get())) send(std::move(frame));
}

void KeeperLink::drop_lease(const engine::Replica& replica, uint64_t lease) {
  send(make_frame({.verb = Verb::drop, .replica = replica.number, .lease = lease}));
}

void KeeperLink::drop(uint64_t replica) { send(make_frame({.verb = Verb::drop, .replica = replica})); }

}  // namespace tensord::daemon
