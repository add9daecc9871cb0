#include "memory/copy_rows.h"

#include <emmintrin.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "base/stream_copy.h"
#include "memory/cast.h"

namespace tensord::memory {

namespace {

// Source bytes that are gathered, cast and scattered at a time; the widest cast makes them eight times as many.
constexpr uint64_t kStageBytes = 4096;
constexpr uint64_t kCastWidening = 8;

struct Rows : base::StreamedRows {
  Stores stores = Stores::cached;
};

// False, and nothing is copied, unless the rows are of this size.
template <size_t kBytes>
bool copy_fixed(const Rows& rows) {
  if (rows.row_bytes != kBytes) return false;
  rows.each([](std::byte* target, const std::byte* source) { std::memcpy(target, source, kBytes); });
  return true;
}

// Rows of kHalf to 2 x kHalf bytes: two copies that may overlap in the middle, instead of a call.
template <size_t kHalf>
void copy_between(const Rows& rows) {
  rows.each([second = rows.row_bytes - kHalf](std::byte* target, const std::byte* source) {
    std::array<std::byte, kHalf> low, high;
    std::memcpy(low.data(), source, kHalf);
    std::memcpy(high.data(), source + second, kHalf);
    std::memcpy(target, low.data(), kHalf);
    std::memcpy(target + second, high.data(), kHalf);
  });
}

void copy_rows(const Rows& rows) {
  if (rows.stores == Stores::streamed && base::is_worth_streaming(rows.row_bytes)) {
    base::stream_rows(rows);
    return base::end_streaming();
  }
  if (rows.row_count > 1 && static_cast<uint64_t>(rows.source_pitch) == rows.row_bytes &&
      static_cast<uint64_t>(rows.target_pitch) == rows.row_bytes) {
    std::memcpy(rows.target, rows.source, rows.row_bytes * rows.row_count);
    return;
  }
  if (copy_fixed<1>(rows) || copy_fixed<2>(rows) || copy_fixed<3>(rows) || copy_fixed<4>(rows)) return;
  if (copy_fixed<8>(rows) || copy_fixed<16>(rows) || copy_fixed<32>(rows) || copy_fixed<64>(rows)) return;
  if (rows.row_bytes < 8) return copy_between<4>(rows);
  if (rows.row_bytes < 16) return copy_between<8>(rows);
  if (rows.row_bytes < 32) return copy_between<16>(rows);
  if (rows.row_bytes < 64) return copy_between<32>(rows);
  rows.each([row_bytes = rows.row_bytes](std::byte* target, const std::byte* source) {
    std::memcpy(target, source, row_bytes);
  });
}

// The largest power of two whose square of rows fits the stage.
uint64_t tile_side(uint64_t row_bytes) {
  uint64_t side = 8;
  while (side * side * 4 * row_bytes <= kStageBytes) side *= 2;
  return side;
}

// Calls visit(tile) for the square tiles of a plane.
template <typename Visit>
void each_tile(const Plane& plane, const Visit& visit) {
  const uint64_t side = tile_side(plane.row_bytes);
  for (uint64_t row = 0; row < plane.row_count; row += side) {
    for (uint64_t line = 0; line < plane.line_count; line += side) {
      Plane tile = plane;
      const auto row_step = static_cast<int64_t>(row);
      const auto line_step = static_cast<int64_t>(line);
      tile.source += row_step * plane.source_row_pitch + line_step * plane.source_line_pitch;
      tile.target += row_step * plane.target_row_pitch + line_step * plane.target_line_pitch;
      tile.row_count = std::min(side, plane.row_count - row);
      tile.line_count = std::min(side, plane.line_count - line);
      visit(tile);
    }
  }
}

// A square of as many elements as a register holds: what lies below each other in `source` comes side by side.
template <typename Element>
void turn_square(const std::byte* source, int64_t source_pitch, std::byte* target, uint64_t target_pitch) {
  constexpr size_t kSide = sizeof(__m128i) / sizeof(Element);
  __m128i rows[kSide], mixed[kSide];
  for (size_t row = 0; row < kSide; ++row, source += source_pitch) {
    rows[row] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  }
  for (size_t done = 1; done < kSide; done *= 2) {  // each step interleaves the upper half with the lower
    for (size_t row = 0; row < kSide / 2; ++row) {
      const __m128i upper = rows[row], lower = rows[row + kSide / 2];
      mixed[2 * row] = sizeof(Element) == 2 ? _mm_unpacklo_epi16(upper, lower) : _mm_unpacklo_epi32(upper, lower);
      mixed[2 * row + 1] = sizeof(Element) == 2 ? _mm_unpackhi_epi16(upper, lower) : _mm_unpackhi_epi32(upper, lower);
    }
    std::copy_n(mixed, kSide, rows);
  }
  for (size_t row = 0; row < kSide; ++row, target += target_pitch) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), rows[row]);
  }
}

// gather_tile by registers; false, and nothing is done, where the tile is no such squares.
template <typename Element>
bool turn_tile(const Plane& tile, std::byte* stage) {
  constexpr uint64_t kSide = sizeof(__m128i) / sizeof(Element);
  const auto adjacent = static_cast<int64_t>(sizeof(Element));
  if (tile.row_bytes != sizeof(Element) || tile.source_line_pitch != adjacent) return false;
  if (tile.row_count % kSide != 0 || tile.line_count % kSide != 0) return false;
  const uint64_t line_bytes = tile.row_count * sizeof(Element);
  for (uint64_t row = 0; row < tile.row_count; row += kSide) {
    const std::byte* const source = tile.source + static_cast<int64_t>(row) * tile.source_row_pitch;
    for (uint64_t line = 0; line < tile.line_count; line += kSide) {
      turn_square<Element>(source + line * sizeof(Element), tile.source_row_pitch,
                           stage + line * line_bytes + row * sizeof(Element), line_bytes);
    }
  }
  return true;
}

// Reads a tile along its lines, where its source lies side by side, into `stage` in the order lines of rows.
void gather_tile(const Plane& tile, std::byte* stage) {
  if (turn_tile<uint16_t>(tile, stage) || turn_tile<uint32_t>(tile, stage)) return;
  const auto row_bytes = static_cast<int64_t>(tile.row_bytes);
  for (uint64_t row = 0; row < tile.row_count; ++row) {
    copy_rows({tile.source + static_cast<int64_t>(row) * tile.source_row_pitch, stage + row * tile.row_bytes,
               tile.row_bytes, tile.line_count, tile.source_line_pitch,
               static_cast<int64_t>(tile.row_count) * row_bytes});
  }
}

void scatter_tile(const Plane& tile, const std::byte* stage) {
  if (tile.target_row_pitch == static_cast<int64_t>(tile.target_row_bytes)) {
    const uint64_t line_bytes = tile.row_count * tile.target_row_bytes;
    return copy_rows(
        {stage, tile.target, line_bytes, tile.line_count, static_cast<int64_t>(line_bytes), tile.target_line_pitch});
  }
  for (uint64_t line = 0; line < tile.line_count; ++line) {
    copy_rows({stage + line * tile.row_count * tile.target_row_bytes,
               tile.target + static_cast<int64_t>(line) * tile.target_line_pitch, tile.target_row_bytes, tile.row_count,
               static_cast<int64_t>(tile.target_row_bytes), tile.target_row_pitch});
  }
}

void cast_packed(const Plane& plane, const std::byte* source, std::byte* target, uint64_t size_bytes,
                 CastPath path = CastPath::fastest) {
  cast_elements(plane.source_dtype, source, plane.target_dtype, target,
                size_bytes / *tensor::dtype_bytes(plane.source_dtype), path);
}

void cast_rows(const Plane& plane, const Rows& rows) {
  if (rows.row_bytes * 2 > kStageBytes) {
    const CastPath path = rows.stores == Stores::streamed ? CastPath::streamed : CastPath::fastest;
    rows.each(
        [&](std::byte* target, const std::byte* source) { cast_packed(plane, source, target, rows.row_bytes, path); });
    return base::end_streaming();
  }
  alignas(64) std::array<std::byte, kStageBytes> gathered;
  alignas(64) std::array<std::byte, kStageBytes * kCastWidening> converted;
  const uint64_t rows_max = kStageBytes / rows.row_bytes;
  for (uint64_t begin = 0; begin < rows.row_count; begin += rows_max) {
    const uint64_t count = std::min(rows_max, rows.row_count - begin);
    const auto step = static_cast<int64_t>(begin);
    copy_rows({rows.source + step * rows.source_pitch, gathered.data(), rows.row_bytes, count, rows.source_pitch,
               static_cast<int64_t>(rows.row_bytes)});
    cast_packed(plane, gathered.data(), converted.data(), count * rows.row_bytes);
    copy_rows({converted.data(), rows.target + step * rows.target_pitch, plane.target_row_bytes, count,
               static_cast<int64_t>(plane.target_row_bytes), rows.target_pitch});
  }
}

// Calls visit(rows) for each line.
template <typename Visit>
void each_line(const Plane& plane, const Visit& visit) {
  Rows rows{plane.source,           plane.target,           plane.row_bytes, plane.row_count,
            plane.source_row_pitch, plane.target_row_pitch, plane.stores};
  for (uint64_t line = 0; line < plane.line_count; ++line) {
    visit(rows);
    rows.source += plane.source_line_pitch;
    rows.target += plane.target_line_pitch;
  }
}

}  // namespace

void copy_plane(const Plane& plane, PlaneOrder order) {
  if (order == PlaneOrder::lines) {
    if (!plane.casts()) return each_line(plane, copy_rows);
    return each_line(plane, [&](const Rows& rows) { cast_rows(plane, rows); });
  }
  // Through a stage, so that source rows a power of two apart do not evict each other from the cache.
  alignas(64) std::array<std::byte, kStageBytes> gathered;
  alignas(64) std::array<std::byte, kStageBytes * kCastWidening> converted;
  each_tile(plane, [&](const Plane& tile) {
    gather_tile(tile, gathered.data());
    if (!plane.casts()) return scatter_tile(tile, gathered.data());
    cast_packed(tile, gathered.data(), converted.data(), tile.line_count * tile.row_count * tile.row_bytes);
    scatter_tile(tile, converted.data());
  });
}

}  // namespace tensord::memory
