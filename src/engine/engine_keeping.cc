// What outlives the daemon: told to a keeper as it changes, and taken over by the next engine.
#include <utility>

#include "base/clock.h"
#include "base/log.h"
#include "base/text.h"
#include "engine/engine.h"

namespace tensord::engine {

using base::Code;
using base::fail;
using base::log;
using base::LogLevel;

// Of one lease, or (0) of the replica with all its leases. What goes with its last lease is not worth it.
void Engine::tell_keeper(const Replica& replica, uint64_t lease) {
  if (keeper_ == nullptr || replica.state != ReplicaState::ready || !replica.stays) return;
  if (lease != 0) return keeper_->keep_lease(replica, lease);
  keeper_->keep(replica);
  for (const auto& [number, held] : replica.leases) keeper_->keep_lease(replica, number);
}

void Engine::tell_keeper_all() {
  for (const auto& [number, replica] : replicas_) tell_keeper(*replica, 0);
}

Status Engine::adopt(std::unique_ptr<Replica> kept, std::vector<memory::Segment> segments) {
  Replica& replica = *kept;
  if (replicas_.contains(replica.number) || by_key_.contains(replica.key))
    return fail(Code::invalid_argument, "replica ", replica.number, " of ", replica.path(), " is there already");
  if (descriptor_count() + segments.size() + replica.descriptor_count() > options_.descriptor_count_max)
    return fail(Code::exhausted, "replica ", replica.number, " of ", replica.path(), " needs too many descriptors");
  const auto& blocks = replica.content->layout.blocks;
  uint64_t total_bytes = 0;
  for (const tensor::Block& block : blocks) total_bytes += block.size_bytes;
  TRY_ASSIGN(replica.fill, memory::FillMap::create(blocks.size(), total_bytes));
  for (size_t at = 0; at < blocks.size(); ++at) replica.fill->mark_block(at, blocks[at].size_bytes);
  replica.fill->end_ready(*replica.artifact);
  TRY_ASSIGN(replica.memory, pool_memory_.adopt(std::move(segments)));
  replica.state = ReplicaState::ready;
  replica.stays = replica.checked = true;
  replica.asked_ns = replica.room_ns = replica.last_used_ns = base::monotonic_ns();
  LoadReport report = waiting_report(replica);
  report.load = replica.load_number = next_load_++;
  report.state = ReplicaState::ready;
  report.artifact = replica.artifact;
  report.read_path = "taken over from a keeper";
  report.notes.push_back("taken over from a keeper: nothing was read");
  keep_report(std::move(report));
  log(LogLevel::info, "replica ", replica.number, " ", replica.path(), " is taken over from a keeper");
  by_key_[replica.key] = last_opened_ = replica.number;
  replicas_[replica.number] = std::move(kept);
  return {};
}

Status Engine::adopt_lease(uint64_t number, uint64_t lease, Lease held) {
  const auto found = replicas_.find(number);
  if (found == replicas_.end()) return fail(Code::not_found, "a lease on replica ", number, ", which is not there");
  if (found->second->leases.contains(lease) || lease_count_ >= options_.lease_count_max)
    return fail(Code::invalid_argument, "lease ", lease, " is there already, or one too many");
  TRY(owner_.watch_hangup(held.read_end.get(), [this, number, lease] { lease_ended(number, lease); }));
  found->second->leases[lease] = std::move(held);
  ++lease_count_;
  next_lease_ = std::max(next_lease_, lease + 1);
  return {};
}

}  // namespace tensord::engine
