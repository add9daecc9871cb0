#include "memory/copy_stream.h"

#include <immintrin.h>

#include <cstring>

namespace tensord::memory {

bool can_stream() {
  static const bool has_avx512 = __builtin_cpu_supports("avx512f");
  return has_avx512;
}

__attribute__((target("avx512f"))) void stream_rows(const StreamedRows& rows) {
  constexpr uint64_t kLineBytes = 64;
  const std::byte* source = rows.source;
  std::byte* target = rows.target;
  for (uint64_t row = 0; row < rows.row_count; ++row) {
    uint64_t at = -reinterpret_cast<uint64_t>(target) % kLineBytes;  // the first whole line of the target
    if (at > rows.row_bytes) at = rows.row_bytes;
    if (at > 0) std::memcpy(target, source, at);
    for (; at + kLineBytes <= rows.row_bytes; at += kLineBytes) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at), _mm512_loadu_si512(source + at));
    }
    if (at < rows.row_bytes) std::memcpy(target + at, source + at, rows.row_bytes - at);
    source += rows.source_pitch;
    target += rows.target_pitch;
  }
  _mm_sfence();        // streaming stores are ordered with nothing else
  _mm256_zeroupper();  // else SSE code that follows is slow
}

}  // namespace tensord::memory
