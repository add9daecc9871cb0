// Copies whose stores go past the caches: no line is read only to be overwritten, and what the caches hold stays.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tensord::base {

// The rows that streaming is faster for, or as fast. Gathers of 512 MiB, two threads, against glibc 2.36's memcpy: on Zen 3
// (AVX2) rows of 256 B 1.05, 1 KiB 1.0, 2 to 8 KiB 1.2-1.3, from 16 KiB 1.2-1.5; on Zen 4 (AVX-512) 512 B 0.97, 1 KiB 1.4,
// 4 and 8 KiB 0.9-1.1, from 16 KiB 1.0-1.5.
inline constexpr bool is_worth_streaming(uint64_t row_bytes) { return row_bytes >= 256; }
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

  // Calls copy(target, source) for each row.
  template <typename Copy>
  void each(const Copy& copy) const {
    const std::byte* from = source;
    std::byte* to = target;
    for (uint64_t row = 0; row < row_count; ++row, from += source_pitch, to += target_pitch) copy(to, from);
  }
};

// Only where can_stream(). Threads that synchronize with this one after end_streaming() see what it wrote. Ending after
// each 4 KiB takes a quarter of the rate.
void stream_rows(const StreamedRows& rows);
void end_streaming();

}  // namespace tensord::base
