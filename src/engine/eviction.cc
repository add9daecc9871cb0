#include "engine/eviction.h"

#include <algorithm>
#include <tuple>

namespace tensord::engine {

std::optional<std::vector<uint64_t>> choose_victims(std::vector<EvictionCandidate> candidates, uint64_t needed_bytes,
                                                    size_t needed_descriptor_count) {
  std::sort(candidates.begin(), candidates.end(), [](const EvictionCandidate& a, const EvictionCandidate& b) {
    return std::tie(a.stays, a.last_used_ns, a.replica) < std::tie(b.stays, b.last_used_ns, b.replica);
  });
  std::vector<uint64_t> victims;
  uint64_t freed_bytes = 0;
  size_t freed_descriptor_count = 0;
  const auto enough = [&] { return freed_bytes >= needed_bytes && freed_descriptor_count >= needed_descriptor_count; };
  for (const EvictionCandidate& candidate : candidates) {
    if (enough()) break;
    if (candidate.held) continue;
    victims.push_back(candidate.replica);
    freed_bytes += candidate.memory_bytes;
    freed_descriptor_count += candidate.descriptor_count;
  }
  if (!enough()) return std::nullopt;
  return victims;
}

std::vector<uint64_t> choose_as_many(std::vector<EvictionCandidate> candidates, uint64_t wanted_bytes) {
  uint64_t idle_bytes = 0;
  for (const EvictionCandidate& one : candidates) idle_bytes += one.held ? 0 : one.memory_bytes;
  return *choose_victims(std::move(candidates), std::min(wanted_bytes, idle_bytes), 0);
}

}  // namespace tensord::engine
