// What outlived the daemon before this one is taken over.
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

Status Engine::adopt(std::unique_ptr<Replica> kept, tensor::Index whole) {
  Replica& replica = *kept;
  if (replicas_.contains(replica.number) || by_key_.contains(replica.key))
    return fail(Code::invalid_argument, "replica ", replica.number, " of ", replica.path(), " is there already");
  replica.state = ReplicaState::ready;
  if (descriptor_count() + replica.descriptor_count() > options_.descriptor_count_max)
    return fail(Code::exhausted, "replica ", replica.number, " of ", replica.path(), " needs too many descriptors");
  const bool on_device = !replica.key.device.empty();
  std::vector<memory::Segment> segments;
  uint64_t memory_bytes = 0;
  for (auto& [fd, size_bytes] : replica.allocations) {
    if (size_bytes > tensor::kIndexBytesMax) return fail(Code::corrupt, "memory of ", size_bytes, " bytes");
    memory_bytes += size_bytes;
    if (on_device) continue;
    TRY_ASSIGN(memory::Segment segment, memory::adopt_segment(std::move(fd), size_bytes));
    segments.push_back(std::move(segment));
  }
  if (!on_device) replica.allocations.clear();
  if (whole.files.size() != replica.key.files.size()) return fail(Code::corrupt, "its index is of other files");
  TRY_ASSIGN(replica.content, content_of(std::move(whole), replica.key.files, replica.key.only, memory_bytes));
  const Content& content = *replica.content;
  replica.image_bytes = on_device ? tensor::device_windows_of(content.index).image_bytes : content.image_bytes;
  replica.device_bytes = on_device ? memory_bytes : 0;
  if (replica.image_bytes > memory_bytes || (!on_device && replica.leaves.size() != content.layout.leaves.size()))
    return fail(Code::corrupt, "its index is of another replica");
  TRY_ASSIGN(replica.index_fd, options_.encode_index(content.index));
  const auto& blocks = content.layout.blocks;
  uint64_t total_bytes = 0;
  for (const tensor::Block& block : blocks) total_bytes += block.size_bytes;
  TRY_ASSIGN(replica.fill, memory::FillMap::create(blocks.size(), total_bytes));
  for (size_t at = 0; at < blocks.size(); ++at) replica.fill->mark_block(at, blocks[at].size_bytes);
  replica.fill->end_ready(*replica.artifact);
  TRY_ASSIGN(replica.memory, pool_memory_.adopt(std::move(segments)));
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
  held.holder.user_id = found->second->owner;
  TRY(owner_.watch_hangup(held.read_end.get(), [this, number, lease] { lease_ended(number, lease); }));
  found->second->leases[lease] = std::move(held);
  ++lease_count_;
  next_lease_ = std::max(next_lease_, lease + 1);
  return {};
}

}  // namespace tensord::engine
