// Which replicas go when memory is needed. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace tensord::engine {

struct EvictionCandidate {
  uint64_t replica = 0;
  uint64_t memory_bytes = 0;
  size_t descriptor_count = 0;
  int64_t last_used_ns = 0;
  bool held = false;  // leased, pinned or being verified
  bool stays = true;  // false: nobody wants it beyond its leases
};

// The least recently used replicas that nobody holds, those that are not to stay before all others, as few as free
// what is needed; nullopt when all of them do not.
std::optional<std::vector<uint64_t>> choose_victims(std::vector<EvictionCandidate> candidates, uint64_t needed_bytes,
                                                    size_t needed_descriptor_count);
// For so many bytes, or all that nobody holds where those are fewer.
std::vector<uint64_t> choose_as_many(std::vector<EvictionCandidate> candidates, uint64_t wanted_bytes);

}  // namespace tensord::engine
