// Replicas on devices: each is copied there from one on another device, or from the host's as that fills.
//
//   open ──► ready on a device that can be read? ──────────────► room? evict ──► memory ──► copy ──► ready
//              └─► open the host's, as any client would ──► filling ┘
//
// Who finds no room on a device is refused at once: nobody waits in line for it.
#include <algorithm>
#include <utility>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/text.h"
#include "engine/engine.h"

namespace tensord::engine {

using base::Code;
using base::fail;
using base::log;
using base::LogLevel;

void Engine::find_source(Replica& replica) {
  const uint64_t number = replica.number;
  const auto found = [this, number](const Result<uint64_t>& source) {
    const auto held = source ? hold(*source) : base::pass_on(source);
    owner_.post(
        [this, number, held] { source_found(number, held.map([](const Replica* one) { return one->number; })); });
  };
  for (const auto& [at, other] : replicas_) {
    const bool same = other->key.files == replica.key.files && other->key.only == replica.key.only;
    if (same && other->state == ReplicaState::ready && !other->key.device.empty() &&
        devices_->reaches(replica.key.device, other->key.device))
      return found(at);
  }
  const Waiter& first = replica.waiters.front();
  OpenOrder order{.path = replica.path(), .files = std::move(replica.files), .only = replica.key.only};
  order.holder = first.holder;
  order.holder.asker = 0;  // the load goes on without who asked for it
  order.memory_wait_ms = first.patience_ns / base::kNsPerMs;
  const std::string path = replica.path();
  open(std::move(order), [found, path](const Result<Grant>& grant) {
    if (grant && !grant->lease.valid())
      return found(fail(Code::exhausted, "open ", path, ": it is copied to a GPU from host memory, and is larger than ",
                        "host_memory; raise that, or open fewer tensors"));
    found(grant.map([](const Grant& granted) { return granted.replica; }));
  });
  last_opened_ = number;
}

void Engine::source_found(uint64_t number, const Result<uint64_t>& source) {
  Replica& replica = *replicas_.at(number);
  if (!source) return fail_waiters(replica, source.error());
  const Replica& from = *replicas_.at(*source);
  replica.source = *source;
  if (replica.waiters.empty()) return forget(number);
  replica.content = from.content;
  replica.state = ReplicaState::waiting;
  replica.room_ns = base::monotonic_ns();
  if (Replica* larger = covering(replica)) return hand_over(replica, *larger);
  // It is known by what it holds, which may be more than was asked for.
  unlist(replica);
  replica.key.only = from.key.only;
  by_key_[replica.key] = number;
  auto index = base::duplicate(from.index_fd.get());
  if (!index) return fail_waiters(replica, index.error());
  replica.index_fd = std::move(*index);
  replica.image_bytes = tensor::device_windows_of(replica.content->index).image_bytes;
  replica.device_bytes = base::align_up(replica.image_bytes, kDevicePageBytes);
  make_on_device(replica);
}

void Engine::make_on_device(Replica& replica) {
  const std::string& device = replica.key.device;
  const uint64_t limit_bytes = options_.device_memory_bytes;
  const uint64_t wanted_bytes = used_on(device);
  if (limit_bytes > 0 && wanted_bytes > limit_bytes) {
    const auto victims = choose_victims(candidates(device), wanted_bytes - limit_bytes, 0);
    if (!victims) return fail_waiters(replica, refusal(replica));
    evict_all(*victims, "to make room on a GPU");
  }
  devices_->make(device, replica.device_bytes, [this, number = replica.number](Result<Allocations> made) {
    made_on_device(number, std::move(made));
  });
}

void Engine::made_on_device(uint64_t number, Result<Allocations> made) {
  Replica& replica = *replicas_.at(number);
  if (!made && made.error().code == Code::exhausted) {
    // Others use the device too: what is full may be the device itself. What nobody holds goes, then it is tried again.
    const auto victims = choose_as_many(candidates(replica.key.device), replica.device_bytes);
    if (victims.empty()) return fail_waiters(replica, refusal(replica));
    evict_all(victims, "to make room on a GPU");
    constexpr int64_t kGoneMs = 100;  // a keeper lets go a little later
    return owner_.call_after(kGoneMs, [this, number] { make_on_device(*replicas_.at(number)); });
  }
  if (!made) return fail_waiters(replica, made.error());
  const Status begun = fill_on_device(replica, std::move(*made));
  if (!begun) return fail_waiters(replica, begun.error());
  for (const Waiter& waiter : std::exchange(replica.waiters, {})) waiter.done(grant(replica, waiter));
}

Status Engine::fill_on_device(Replica& replica, Allocations made) {
  const tensor::ImageLayout& layout = replica.content->layout;
  TRY_ASSIGN(replica.fill, memory::FillMap::create(layout.blocks.size(), layout.block_bytes()));
  replica.allocations = std::move(made);
  replica.device_bytes = 0;
  for (const auto& [fd, bytes] : replica.allocations) replica.device_bytes += bytes;
  const Replica& source = *replicas_.at(replica.source);
  LoadReport report = waiting_report(replica);
  report.load = replica.load_number = next_load_++;
  report.state = ReplicaState::filling;
  report.fill_ns = base::monotonic_ns();
  report.thread_count = 1;
  report.read_path = source.key.device.empty() ? "host memory, by copy engines" : source.key.device + ", by peer copy";
  report.memory_ns = 0;  // nobody waits in line
  report.checked_against_record = source.checked;
  report.notes.push_back(
      base::text("copied to ", replica.key.device, " from replica ", source.number, ": ", report.read_path));
  log(LogLevel::info, "load ", report.load, ": ", replica.path(), " ", report.notes.back());
  keep_report(std::move(report));
  replica.state = ReplicaState::filling;
  ++replica.use_count;
  devices_->fill(source, replica, [this, number = replica.number](const Status& filled) {
    Replica& target = *replicas_.at(number);
    --target.use_count;
    target.copied = true;
    if (!filled) target.error = filled.error();
    end_on_device(target);
  });
  return {};
}

// Ready when the bytes are there and their source has come to a good end: its files may have changed under it.
void Engine::end_on_device(Replica& replica) {
  const Replica& source = *replicas_.at(replica.source);
  if (!replica.copied || (source.state == ReplicaState::filling && !replica.error)) return;
  if (!replica.error) replica.error = source.error;
  if (LoadReport* report = report_of(replica.number)) {
    const int64_t now_ns = base::monotonic_ns();
    report->wall_ns = now_ns - report->begin_ns;
    report->counters.bytes = replica.error ? 0 : replica.content->index.payload_bytes();
    report->counters.read_ns = now_ns - report->fill_ns;
  }
  const Result<tensor::Digest> artifact =
      replica.error ? tl::unexpected(*replica.error) : Result<tensor::Digest>(*source.artifact);
  let_go(std::exchange(replica.source, 0));
  end_load(replica, artifact);
}

}  // namespace tensord::engine
