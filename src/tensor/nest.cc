#include "tensor/nest.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "base/check.h"

namespace tensord::tensor {

using base::Code;
using base::fail;

namespace {

using Wide = __int128;

// Whether `outer` goes on where the last iteration of `inner` ends, on both sides.
bool continues(const Repeat& inner, const Repeat& outer) {
  uint64_t count;
  return outer.source_pitch == Wide(inner.count) * inner.source_pitch &&
         outer.target_pitch == Wide(inner.count) * inner.target_pitch &&
         !__builtin_mul_overflow(inner.count, outer.count, &count);
}

// The bytes that `row_bytes` at `offset` touch under loops with these pitches.
std::optional<Extent> reach(uint64_t offset, uint64_t row_bytes, std::span<const Repeat> loops,
                            int64_t Repeat::*pitch) {
  constexpr Wide kEnd = Wide(1) << 64;
  Wide begin = offset;
  Wide end = begin + row_bytes;
  for (const Repeat& loop : loops) {
    if (loop.count == 0) return Extent{offset, offset};
    // Below 2^127: a count has 64 bits, a pitch 63 and a sign.
    const Wide distance = Wide(loop.count - 1) * (loop.*pitch);
    (distance < 0 ? begin : end) += distance;
    if (begin < 0 || end >= kEnd) return std::nullopt;
  }
  if (end >= kEnd) return std::nullopt;
  return Extent{static_cast<uint64_t>(begin), static_cast<uint64_t>(end)};
}

}  // namespace

uint64_t magnitude(int64_t pitch) { return pitch < 0 ? -static_cast<uint64_t>(pitch) : static_cast<uint64_t>(pitch); }

Nest::Nest(const Copy2D& record) : head(record) {
  add({record.row_count, record.source_pitch, record.target_pitch});
  for (size_t at = 0; at < record.outer_count; ++at) add(record.outer[at]);
  head.row_count = 1;
  head.source_pitch = head.target_pitch = 0;
  head.outer_count = 0;
  head.outer = {};
}

void Nest::add(const Repeat& loop) {
  if (loop.count == 1) return;
  CHECK(loop_count < loops.size());
  loops[loop_count++] = loop;
}

Repeat Nest::take(size_t at) {
  const Repeat loop = loops[at];
  std::copy(loops.begin() + at + 1, loops.begin() + loop_count, loops.begin() + at);
  --loop_count;
  return loop;
}

void Nest::advance(const Repeat& loop, uint64_t index) {
  head.source_offset += index * static_cast<uint64_t>(loop.source_pitch);
  head.target_offset += index * static_cast<uint64_t>(loop.target_pitch);
}

void Nest::simplify() {
  constexpr int64_t kLowest = std::numeric_limits<int64_t>::min();
  const auto end = loops.begin() + loop_count;
  for (auto loop = loops.begin(); loop != end; ++loop) {
    if (loop->target_pitch >= 0 || loop->target_pitch == kLowest || loop->source_pitch == kLowest) continue;
    advance(*loop, loop->count - 1);
    loop->source_pitch = -loop->source_pitch;
    loop->target_pitch = -loop->target_pitch;
  }
  std::sort(loops.begin(), end, [](const Repeat& a, const Repeat& b) {
    return std::tuple(magnitude(a.target_pitch), magnitude(a.source_pitch), a.count) <
           std::tuple(magnitude(b.target_pitch), magnitude(b.source_pitch), b.count);
  });
  // The row is the innermost loop there is.
  size_t kept = 0;
  for (size_t at = 0; at < loop_count; ++at) {
    const Repeat& loop = loops[at];
    uint64_t longer;
    const bool fits = !__builtin_mul_overflow(head.row_bytes, loop.count, &longer);
    const bool is_next = loop.source_pitch >= 0 && static_cast<uint64_t>(loop.source_pitch) == head.row_bytes &&
                         loop.target_pitch >= 0 && static_cast<uint64_t>(loop.target_pitch) == head.target_row_bytes();
    if (kept == 0 && fits && is_next) {
      head.row_bytes = longer;
    } else if (kept > 0 && continues(loops[kept - 1], loop)) {
      loops[kept - 1].count *= loop.count;
    } else {
      loops[kept++] = loop;
    }
  }
  loop_count = kept;
}

Copy2D Nest::record() const {
  Copy2D record = head;
  if (loop_count > 0) {
    record.row_count = loops[0].count;
    record.source_pitch = loops[0].source_pitch;
    record.target_pitch = loops[0].target_pitch;
    record.outer_count = static_cast<uint8_t>(loop_count - 1);
    for (size_t at = 1; at < loop_count; ++at) record.outer[at - 1] = loops[at];
  }
  // A transpose: the loop that reads side by side goes next to the rows, where tiles are cut from the two.
  if (record.row_bytes <= kTileRowBytes && record.outer_count > 1) {
    const auto begin = record.outer.begin();
    const auto closest = std::min_element(begin, begin + record.outer_count, [](const Repeat& a, const Repeat& b) {
      // 0 wraps around to the largest number: a broadcast is no neighbour.
      return magnitude(a.source_pitch) - 1 < magnitude(b.source_pitch) - 1;
    });
    if (magnitude(closest->source_pitch) - 1 < magnitude(record.source_pitch) - 1)
      std::rotate(begin, closest, closest + 1);
  }
  return record;
}

Status Nest::append_to(std::vector<Copy2D>& records) const {
  if (loop_count <= 1 + kOuterMax) {
    if (records.size() >= kRecordsMax)
      return fail(Code::unsupported, "plan a copy: it needs more than ", kRecordsMax, " records");
    records.push_back(record());
    return {};
  }
  // The loops with the fewest iterations outside of the rows make the fewest records.
  Nest rest = *this;
  const auto shortest = std::min_element(rest.loops.begin() + 1, rest.loops.begin() + loop_count,
                                         [](const Repeat& a, const Repeat& b) { return a.count < b.count; });
  const Repeat loop = rest.take(static_cast<size_t>(shortest - rest.loops.begin()));
  for (uint64_t index = 0; index < loop.count; ++index) {
    TRY(rest.append_to(records));
    rest.advance(loop, 1);
  }
  return {};
}

std::optional<Extent> source_reach(const Nest& nest) {
  return reach(nest.head.source_offset, nest.head.row_bytes, {nest.loops.data(), nest.loop_count},
               &Repeat::source_pitch);
}

std::optional<Extent> target_reach(const Nest& nest) {
  return reach(nest.head.target_offset, nest.head.target_row_bytes(), {nest.loops.data(), nest.loop_count},
               &Repeat::target_pitch);
}

void sort_records(std::vector<Copy2D>& records) {
  const auto key = [](const Copy2D& a) { return std::pair(a.source_offset, a.target_offset); };
  const auto before = [&](const Copy2D& a, const Copy2D& b) { return key(a) < key(b); };
  if (!std::is_sorted(records.begin(), records.end(), before)) std::stable_sort(records.begin(), records.end(), before);
}

}  // namespace tensord::tensor
