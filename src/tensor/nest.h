// Nest: a record under construction, with any number of loops. Private to the plan_*.cc files.
//
//   loops[n-1] around .. loops[1] around loops[0] around one contiguous row of head.row_bytes
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "tensor/plan.h"

namespace tensord::tensor {

uint64_t magnitude(int64_t pitch);

struct Nest {
  Copy2D head;  // its loop fields (row_count, pitches, outer) are unused
  std::array<Repeat, kRankMax> loops;
  size_t loop_count = 0;

  explicit Nest(const Copy2D& record);  // loops of one iteration are left out

  // Loops of one iteration are left out; the room for kRankMax loops is the caller's to keep to.
  void add(const Repeat& loop);
  Repeat take(size_t at);  // removes a loop
  // Moves the beginning to iteration `index` of a loop that was taken out.
  void advance(const Repeat& loop, uint64_t index);

  // Makes target pitches positive, sorts the loops by them (smallest innermost), merges loops, and grows the row. The
  // elements that are copied stay the same. Offsets of unchecked nests may wrap around, and then stay out of bounds.
  void simplify();

  // Appends the simplified nest as records: one, or several where there are more loops than a record holds.
  // Code::unsupported beyond kRecordsMax.
  Status append_to(std::vector<Copy2D>& records) const;

 private:
  Copy2D record() const;
};

// The bytes that a nest reads, or writes; nullopt when that leaves the 64-bit address space.
std::optional<Extent> source_reach(const Nest& nest);
std::optional<Extent> target_reach(const Nest& nest);

// Canonical order: by source_offset, then target_offset.
void sort_records(std::vector<Copy2D>& records);

}  // namespace tensord::tensor
