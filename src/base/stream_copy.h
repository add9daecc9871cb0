// Copies whose stores go past the caches: no line is read only to be overwritten, and what the caches hold stays.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tensord::base {

// The rows that streaming is faster for. Gathers of 512 MiB on Zen 4, two threads, streamed against glibc 2.36's memcpy:
// rows of 512 B 0.97, 1 KiB 1.4, 2 KiB 1.4, 4 KiB 0.9-1.1, 8 KiB 0.9-1.1, 16 KiB 1.0-1.2, 64 KiB 1.2-1.4, 1 MiB 1.2-1.5.
// Between 2 and 16 KiB memcpy moves whole lines without reading them first, too.
inline constexpr bool is_worth_streaming(uint64_t row_bytes) {
  return (row_bytes >= 1 << 10 && row_bytes <= 2 << 10) || row_bytes >= 16 << 10;
}
// Below this much payload the caller may find it in a cache after a copy through the caches.
inline constexpr uint64_t kStreamBytes = 32 << 20;

// Whether this CPU has the instructions that make it worth while (AVX512F or AVX2).
bool can_stream();

struct StreamedRows {
  const std::byte* source;
  std::byte* target;
  uint64_t row_bytes;
  uint64_t row_count;
  int64_t source_pitch;
  int64_t target_pitch;
};

// Only where can_stream(). Threads that synchronize with this one after end_streaming() see what it wrote. Ending after
// each 4 KiB takes a quarter of the rate.
void stream_rows(const StreamedRows& rows);
void end_streaming();

}  // namespace tensord::base
