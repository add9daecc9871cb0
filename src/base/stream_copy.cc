#include "base/stream_copy.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace tensord::base {

namespace {

constexpr uint64_t kLineBytes = 64;

// Whole lines to a target at a line's beginning.
using CopyLines = void(std::byte* target, const std::byte* source, uint64_t size_bytes);

__attribute__((target("avx512f"))) void stream_lines_512(std::byte* target, const std::byte* source,
                                                         uint64_t size_bytes) {
  for (uint64_t at = 0; at < size_bytes; at += kLineBytes) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at), _mm512_loadu_si512(source + at));
  }
  _mm256_zeroupper();  // else SSE code that follows is slow
}

__attribute__((target("avx2"))) void stream_lines_256(std::byte* target, const std::byte* source, uint64_t size_bytes) {
  for (uint64_t at = 0; at < size_bytes; at += kLineBytes) {
    const auto* from = reinterpret_cast<const __m256i*>(source + at);
    auto* to = reinterpret_cast<__m256i*>(target + at);
    _mm256_stream_si256(to, _mm256_loadu_si256(from));
    _mm256_stream_si256(to + 1, _mm256_loadu_si256(from + 1));
  }
  _mm256_zeroupper();
}

// nullptr where the CPU has no instructions that are worth while.
CopyLines* stream_lines() {
  static CopyLines* const lines = __builtin_cpu_supports("avx512f") ? stream_lines_512
                                  : __builtin_cpu_supports("avx2")  ? stream_lines_256
                                                                    : nullptr;
  return lines;
}

}  // namespace

bool can_stream() { return stream_lines() != nullptr; }

void stream_rows(const StreamedRows& rows) {
  CopyLines* const copy_lines = stream_lines();
  rows.each([&](std::byte* target, const std::byte* source) {
    // Up to the first whole line of the target, its whole lines, and what is left.
    const uint64_t head = std::min(-reinterpret_cast<uint64_t>(target) % kLineBytes, rows.row_bytes);
    const uint64_t lines = (rows.row_bytes - head) / kLineBytes * kLineBytes;
    const uint64_t tail = rows.row_bytes - head - lines;
    if (head > 0) std::memcpy(target, source, head);
    copy_lines(target + head, source + head, lines);
    if (tail > 0) std::memcpy(target + head + lines, source + head + lines, tail);
  });
}

void end_streaming() { _mm_sfence(); }

}  // namespace tensord::base
