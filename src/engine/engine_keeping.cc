// What outlived the daemon before this one is taken over.
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

Status Engine::adopt(std::unique_ptr<Replica> kept, tensor::Index whole) {
  Replica& replica = *kept;
  if (replicas_.contains(replica.number) || by_key_.contains(replica.key))
    return fail(Code::invalid_argument, "replica ", replica.number, " of ", replica.path(), " is there already");
  replica.state = ReplicaState::ready;
  if (descriptor_count() + replica.descriptor_count() > options_.descriptor_count_max)
    return fail(Code::exhausted, "replica ", replica.number, " of ", replica.path(), " needs too many descriptors");
  const bool on_device = !replica.key.device.empty();
  uint64_t memory_bytes = 0;
  for (const auto& [fd, size_bytes] : replica.allocations) {
    if (size_bytes > tensor::kIndexBytesMax) return fail(Code::corrupt, "memory of ", size_bytes, " bytes");
    memory_bytes += size_bytes;
  }
  if (!on_device) {
    TRY_ASSIGN(replica.memory, memory::adopt_segments(std::exchange(replica.allocations, {})));
  }
  if (whole.files.size() != replica.key.files.size()) return fail(Code::corrupt, "its index is of other files");
  // An image in host memory has at most so much more than one on a device.
  const uint64_t image_bytes_max =
      memory_bytes + whole.tensors.size() * (tensor::kWindowGapBytes + 2 * tensor::kImageAlignment);
  TRY_ASSIGN(replica.content, read_content({}, {.only = replica.key.only,
                                                .whole = whole_content(std::move(whole), replica.key.files),
                                                .image_bytes_max = image_bytes_max}));
  const Content& content = *replica.content;
  replica.image_bytes = on_device ? tensor::device_windows_of(content.index).image_bytes : content.image_bytes;
  replica.device_bytes = on_device ? memory_bytes : 0;
  const bool fits = on_device ? base::align_up(replica.image_bytes, kDevicePageBytes) == memory_bytes
                              : replica.image_bytes <= memory_bytes;
  if (content.image_bytes > image_bytes_max || !fits ||
      (!on_device && replica.leaves.size() != content.layout.leaves.size()))
    return fail(Code::corrupt, "its index is of another replica");
  TRY_ASSIGN(replica.index_fd, options_.encode_index(content.index));
  const auto& blocks = content.layout.blocks;
  TRY_ASSIGN(replica.fill, memory::FillMap::create(blocks.size(), content.layout.block_bytes()));
  for (size_t at = 0; at < blocks.size(); ++at) replica.fill->mark_block(at, blocks[at].size_bytes);
  replica.fill->end_ready(*replica.artifact);
  pool_memory_.adopt(replica.memory);
  replica.stays = replica.checked = true;
  replica.asked_ns = replica.room_ns = replica.last_used_ns = base::monotonic_ns();
  LoadReport report = waiting_report(replica);
  report.load = replica.load_number = next_load_++;
  report.state = ReplicaState::ready;
  report.artifact = replica.artifact;
  report.checked_against_record = true;  // by the daemon before
  report.read_path = "taken over from a keeper";
  report.notes.push_back("taken over from a keeper: nothing was read");
  keep_report(std::move(report));
  log(LogLevel::info, "replica ", replica.number, " ", replica.path(), " is taken over from a keeper");
  by_key_[replica.key] = last_opened_ = replica.number;
  replicas_[replica.number] = std::move(kept);
  return {};
}

}  // namespace tensord::engine
