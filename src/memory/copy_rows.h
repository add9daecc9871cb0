// The loops that move bytes for copy.cc. No threads, no checks: what the plan says is done.
//
//   plane   [row][row][row]..    row_pitch apart on either side
//           [row][row][row]..    plane_pitch below
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor/dtype.h"

namespace tensord::memory {

enum class Stores : uint8_t { cached, streamed };  // streamed: see base/stream_copy.h

struct Plane {
  const std::byte* source = nullptr;
  std::byte* target = nullptr;
  uint64_t row_bytes = 0;         // of the source
  uint64_t target_row_bytes = 0;  // others where the dtypes differ
  uint64_t row_count = 0;
  int64_t source_row_pitch = 0;
  int64_t target_row_pitch = 0;
  uint64_t line_count = 1;  // how many times the rows are repeated
  int64_t source_line_pitch = 0;
  int64_t target_line_pitch = 0;
  Stores stores = Stores::cached;
  tensor::Dtype source_dtype = tensor::Dtype::u8;  // cast where they differ
  tensor::Dtype target_dtype = tensor::Dtype::u8;

  bool casts() const { return source_dtype != target_dtype; }
};

// Lines: row after row, line after line. Tiles: in squares, for small rows (up to tensor::kTileRowBytes) whose lines read
// closer together than the rows do.
enum class PlaneOrder : uint8_t { lines, tiles };
void copy_plane(const Plane& plane, PlaneOrder order);

}  // namespace tensord::memory
