// CopyPlan: a View compiled against an Index: a flat list of strided copies from one memory, the source, into another,
// the target. A value without effects.
//
//   source  ....[row 0]......[row 1]......[row 2]....      source_pitch apart
//   target  [row 0][row 1][row 2]                          target_pitch apart
//
// A record is compiled from shapes, never from rows: a [5120, 17408] matrix cut by columns is one record. Its size
// does not grow with the tensor; a plan grows with the number of (tensor, target) pairs only.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tensor/dtype.h"
#include "tensor/index.h"
#include "tensor/view.h"

namespace tensord::tensor {

// A loop around rows: `count` times, moving by the pitches (bytes; may be negative; source 0 broadcasts).
struct Repeat {
  uint64_t count = 1;
  int64_t source_pitch = 0;
  int64_t target_pitch = 0;
  auto operator<=>(const Repeat&) const = default;
};

// Loops outside of the rows a record can hold. Real checkpoints need 1 (expert stacks) or 2 (permuted convolutions);
// what needs more becomes several records.
inline constexpr size_t kOuterMax = 4;

// A plan is refused (Code::unsupported) rather than grown beyond this: 160 MiB of records.
inline constexpr size_t kRecordsMax = size_t{1} << 20;

// Rows up to a cache line are copied in tiles where the loop around them is the one that reads side by side.
inline constexpr uint64_t kTileRowBytes = 64;

struct Copy2D {
  uint8_t outer_count = 0;
  Dtype source_dtype = Dtype::u8;  // differ only where a cast is wanted; then row_bytes counts source bytes
  Dtype target_dtype = Dtype::u8;
  uint64_t source_offset = 0;
  uint64_t target_offset = 0;
  uint64_t row_bytes = 0;  // contiguous on both sides
  uint64_t row_count = 1;
  int64_t source_pitch = 0;
  int64_t target_pitch = 0;
  std::array<Repeat, kOuterMax> outer{};  // outer[0] is the innermost; outer_count are used

  bool casts() const { return source_dtype != target_dtype; }
  bool is_empty() const;              // moves nothing, wherever it points
  uint64_t outer_iterations() const;  // product of the outer counts
  // Where one of these iterations begins, on either side; outer[0] counts fastest.
  struct Place {
    uint64_t source_offset = 0, target_offset = 0;
  };
  Place place(uint64_t iteration) const;
  uint64_t cast_bytes(uint64_t source_bytes) const;  // what so many bytes of whole elements become
  uint64_t target_row_bytes() const { return cast_bytes(row_bytes); }
  uint64_t target_bytes() const;
  bool is_transposed() const;  // small rows, and outer[0] reads closer together than the rows do
  auto operator<=>(const Copy2D&) const = default;
};

struct CopyPlan {
  std::vector<Copy2D> records;  // canonical order: by source_offset, then target_offset

  uint64_t target_bytes() const;  // sum over the records
  bool operator==(const CopyPlan&) const = default;
};

// Half-open byte interval [begin, end) that a record can touch; empty for a record that moves nothing. For records that
// passed check_plan.
struct Extent {
  uint64_t begin = 0;
  uint64_t end = 0;
  bool operator==(const Extent&) const = default;
};

// --- compiling -------------------------------------------------------------------------------------------------

// One wanted copy: `from` (a region of the source) into `to` (a region of the target).
// Shapes must be equal (a mismatch is Code::invalid_argument naming `label`). Where dtypes differ, `from` is cast.
struct Wanted {
  std::string_view label;  // for messages: the tensor's name; must outlive the call
  Strided from;
  Strided to;
  Dtype source_dtype = Dtype::u8;
  Dtype target_dtype = Dtype::u8;
};

// Whether executors can cast between the two: all pairs of F16, BF16, F32, F64, and from F8_E4M3, F8_E5M2 to those.
bool can_cast(Dtype source, Dtype target);

// Loops are merged where both sides allow it, sorted so that the target is written in address order where that is
// also good for reading, and the longest contiguous row is found. Target pitches come out positive. Records with 0
// elements vanish. Offsets and extents are checked against wrap-around (never wrap: Code::invalid_argument). Wanted that
// need more loops than a record holds become several records, or Code::unsupported beyond kRecordsMax.
Result<CopyPlan> compile(std::span<const Wanted> wanted);

// --- checking ----------------------------------------------------------------------------------------------------

// What to say of a record beside its number, with a space behind it; asked for records that overlap.
using RecordName = std::function<std::string(size_t record)>;
inline std::string no_name(size_t) { return {}; }

// Against the sizes of source and target. Refused with Code::invalid_argument, naming record and offsets: reads or writes
// out of bounds, and two records (or two rows of one) that write one byte. Interval
// arithmetic; only records whose extents meet are looked at more closely (equal pitches by residue, else row by row up
// to 16 Mi rows, beyond which Code::unsupported). Records that move 0 bytes are ignored wherever they point. Broadcast
// and overlapping reads are fine.
Status check_plan(const CopyPlan& plan, uint64_t source_bytes, uint64_t target_bytes, const RecordName& name = no_name);

// A box out of a record: rows [row_begin, row_begin + row_count) of each of the iterations [outer_begin, outer_begin +
// outer_count) of its outer loops, counted as one, outer[0] fastest; and, where a single row is larger than a task,
// source bytes [byte_begin, byte_begin + byte_count) of it.
struct Task {
  uint32_t record = 0;
  uint64_t outer_begin = 0;
  uint64_t outer_count = 1;
  uint64_t row_begin = 0;
  uint64_t row_count = 1;
  uint64_t byte_begin = 0;
  uint64_t byte_count = 0;
};

// Cuts a checked plan into tasks of about `task_bytes` of source payload, in the plan's order, one by one, so that
// cutting needs no memory. Small records are not joined: an executor takes several tasks at a time. `plan` must outlive
// it. Not thread safe.
class TaskCutter {
 public:
  TaskCutter(const CopyPlan& plan, uint64_t task_bytes) : plan_(plan), task_bytes_(task_bytes) {}
  std::optional<Task> next();

 private:
  struct Step {  // the size of a whole task of the current record
    uint64_t outers = 0, rows = 0, bytes = 0;
  };
  void open_record();

  const CopyPlan& plan_;
  const uint64_t task_bytes_;
  uint32_t record_ = 0;
  Step step_;  // zeros: the record is not open yet
  uint64_t outer_ = 0, row_ = 0, byte_ = 0;
};

// The interval of its source that a task reads.
Extent source_extent(const Copy2D& record, const Task& task);

}  // namespace tensord::tensor
