#include <algorithm>
#include <array>

#include "base/bytes.h"
#include "tensor/nest.h"
#include "tensor/plan.h"

namespace tensord::tensor {

using base::Code;
using base::fail;

namespace {

// Rows (and pairs of records) that are looked at one by one before a plan is refused: about a second of work.
constexpr uint64_t kExaminedMax = uint64_t{16} << 20;

tl::unexpected<base::Error> refuse(size_t record, const auto&... why) {
  return fail(Code::invalid_argument, "check plan: record ", record, " ", why...);
}

Status check_form(size_t number, const Copy2D& record) {
  if (record.outer_count > kOuterMax) return refuse(number, "has ", record.outer_count, " outer loops");
  if (!record.casts()) return {};
  if (!can_cast(record.source_dtype, record.target_dtype)) {
    return refuse(number, "has no cast from ", dtype_name(record.source_dtype), " to ",
                  dtype_name(record.target_dtype));
  }
  if (record.row_bytes % *dtype_bytes(record.source_dtype) != 0) {
    return refuse(number, "casts rows of ", record.row_bytes, " bytes, no whole number of elements");
  }
  return {};
}

Status check_bounds(size_t number, std::string_view side, uint64_t size_bytes, uint64_t offset,
                    std::optional<Extent> extent) {
  if (!extent) return refuse(number, "leaves the address space of the ", side, " from offset ", offset);
  if (extent->end <= size_bytes) return {};
  return refuse(number, "touches bytes ", extent->begin, " to ", extent->end, " of the ", side, ", which has ",
                size_bytes);
}

// What one record writes: rows of row_bytes under loops with positive pitches, smallest innermost.
struct Writes {
  uint32_t record = 0;
  uint64_t begin = 0;
  uint64_t row_bytes = 0;
  struct Loop {
    uint64_t count, pitch;
  };
  std::array<Loop, 1 + kOuterMax> loops;
  size_t loop_count = 0;

  uint64_t row_count() const {
    uint64_t count = 1;
    for (size_t at = 0; at < loop_count; ++at) count = base::checked_multiply(count, loops[at].count).value_or(~0ull);
    return count;
  }
  // From the first byte to the last one of the innermost loops alone.
  uint64_t span(size_t inner_loops) const {
    uint64_t bytes = row_bytes;
    for (size_t at = 0; at < inner_loops; ++at) bytes += (loops[at].count - 1) * loops[at].pitch;
    return bytes;
  }
  uint64_t end() const { return begin + span(loop_count); }
  // The innermost loops alone, in an iteration of the others that begins at `place`.
  Writes inner(size_t inner_loops, uint64_t place) const {
    Writes part = *this;
    part.begin = place;
    part.loop_count = inner_loops;
    return part;
  }
  // Each loop steps over all that the loops inside of it write: then no row meets another.
  bool is_nested() const {
    for (size_t at = 0; at < loop_count; ++at) {
      if (loops[at].pitch < span(at)) return false;
    }
    return true;
  }
};

Writes writes_of(uint32_t number, const Copy2D& record) {
  Nest nest(record);
  nest.head.row_bytes = record.target_row_bytes();
  nest.head.source_dtype = nest.head.target_dtype;
  // Loops merge by what they write, wherever it is read from.
  for (size_t at = 0; at < nest.loop_count; ++at) nest.loops[at].source_pitch = nest.loops[at].target_pitch;
  nest.simplify();
  Writes writes;
  writes.record = number;
  writes.begin = nest.head.target_offset;
  writes.row_bytes = nest.head.row_bytes;
  writes.loop_count = nest.loop_count;
  for (size_t at = 0; at < nest.loop_count; ++at) {
    writes.loops[at] = {nest.loops[at].count, static_cast<uint64_t>(nest.loops[at].target_pitch)};
  }
  return writes;
}

// Whether no two of several records, and no two rows of one, write the same byte: then none moves more than fits its
// target, and no amount wraps around. Tells at most one budget of work.
class Overlap {
 public:
  explicit Overlap(const RecordName& name) : name_(name) {}
  Status examine(std::span<Writes> all) {
    for (const Writes& one : all) TRY(examine_self(one));
    const auto before = [](const Writes& a, const Writes& b) { return a.begin < b.begin; };
    if (!std::is_sorted(all.begin(), all.end(), before)) std::sort(all.begin(), all.end(), before);
    for (size_t begin = 0; begin < all.size();) {
      size_t end = begin + 1;
      for (uint64_t reach = all[begin].end(); end < all.size() && all[end].begin < reach; ++end) {
        reach = std::max(reach, all[end].end());
      }
      if (end - begin > 1) TRY(examine_cluster(all.subspan(begin, end - begin)));
      begin = end;
    }
    return {};
  }

 private:
  Status examine_self(const Writes& one) {
    if (one.is_nested()) return {};
    // The smallest pitch below the row: its second iteration writes into its first.
    if (one.loops[0].pitch < one.row_bytes) return meet(one, one, one.begin + one.loops[0].pitch);
    return examine_rows({&one, 1});
  }

  // A row of the cluster's largest pitch, seen as a grid:  column = (offset - begin) % pitch,  row = .. / pitch.
  struct Cell {
    const Writes* writes;
    uint64_t column_begin, column_end, row_begin, row_end;
    size_t rest_loops;  // how many loops are left inside of the cell's rows
  };

  Status examine_cluster(std::span<const Writes> cluster) {
    uint64_t pitch = 0;
    uint64_t begin = ~uint64_t{0};
    for (const Writes& one : cluster) {
      if (one.loop_count > 0) pitch = std::max(pitch, one.loops[one.loop_count - 1].pitch);
      begin = std::min(begin, one.begin);
    }
    if (pitch == 0) return examine_rows(cluster);
    std::vector<Cell> cells;
    cells.reserve(cluster.size());
    for (const Writes& one : cluster) {
      const bool steps = one.loop_count > 0 && one.loops[one.loop_count - 1].pitch == pitch;
      const size_t rest_loops = one.loop_count - (steps ? 1 : 0);
      const uint64_t width = one.span(rest_loops);
      const uint64_t column = (one.begin - begin) % pitch;
      const uint64_t row = (one.begin - begin) / pitch;
      if (width > pitch - column) return examine_rows(cluster);  // wraps into the next row
      const uint64_t rows = steps ? one.loops[rest_loops].count : 1;
      cells.push_back({&one, column, column + width, row, row + rows, rest_loops});
    }
    return examine_cells(cells, begin, pitch);
  }

  Status examine_cells(std::vector<Cell>& cells, uint64_t begin, uint64_t pitch) {
    std::sort(cells.begin(), cells.end(), [](const Cell& a, const Cell& b) { return a.column_begin < b.column_begin; });
    for (size_t first = 0; first < cells.size(); ++first) {
      const Cell& a = cells[first];
      for (size_t second = first + 1; second < cells.size(); ++second) {
        const Cell& b = cells[second];
        if (b.column_begin >= a.column_end) break;
        TRY(spend(1));
        const uint64_t row = std::max(a.row_begin, b.row_begin);
        if (row >= std::min(a.row_end, b.row_end)) continue;
        // The two rows lie side by side here: what is left of the loops decides.
        const uint64_t row_begin = begin + row * pitch;
        const std::array<Writes, 2> pair = {a.writes->inner(a.rest_loops, row_begin + a.column_begin),
                                            b.writes->inner(b.rest_loops, row_begin + b.column_begin)};
        TRY(examine_cluster(pair));
      }
    }
    return {};
  }

  // The last resort: all rows, one by one.
  Status examine_rows(std::span<const Writes> cluster) {
    struct Row {
      uint64_t begin;
      uint32_t at;
    };
    uint64_t count = 0;
    for (const Writes& one : cluster) count = base::checked_add(count, one.row_count()).value_or(~0ull);
    TRY(spend(count));
    std::vector<Row> rows;
    rows.reserve(count);
    for (uint32_t at = 0; at < cluster.size(); ++at) {
      const Writes& one = cluster[at];
      for (uint64_t index = 0, row_count = one.row_count(); index < row_count; ++index) {
        uint64_t offset = one.begin;
        uint64_t left = index;
        for (size_t loop = 0; loop < one.loop_count; ++loop) {
          offset += left % one.loops[loop].count * one.loops[loop].pitch;
          left /= one.loops[loop].count;
        }
        rows.push_back({offset, at});
      }
    }
    std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.begin < b.begin; });
    for (size_t at = 1; at < rows.size(); ++at) {
      const Writes& a = cluster[rows[at - 1].at];
      if (rows[at - 1].begin + a.row_bytes > rows[at].begin) return meet(a, cluster[rows[at].at], rows[at].begin);
    }
    return {};
  }

  tl::unexpected<base::Error> meet(const Writes& a, const Writes& b, uint64_t offset) const {
    if (a.record == b.record) {
      return refuse(a.record, name_(a.record), "writes byte ", offset, " of the target more than once");
    }
    const auto [first, second] = std::minmax(a.record, b.record);
    return refuse(first, name_(first), "and record ", second, " ", name_(second), "both write byte ", offset,
                  " of the target");
  }

  Status spend(uint64_t amount) {
    if (amount <= budget_) {
      budget_ -= amount;
      return {};
    }
    return fail(Code::unsupported, "check plan: more than ", kExaminedMax,
                " interleaved rows would have to be looked at one by one");
  }

  const RecordName& name_;
  uint64_t budget_ = kExaminedMax;
};

}  // namespace

Status check_plan(const CopyPlan& plan, uint64_t source_bytes, uint64_t target_bytes, const RecordName& name) {
  if (plan.records.size() > ~uint32_t{0}) return fail(Code::unsupported, "check plan: more than 2^32 records");
  std::vector<Writes> writes;
  writes.reserve(plan.records.size());
  for (size_t number = 0; number < plan.records.size(); ++number) {
    const Copy2D& record = plan.records[number];
    TRY(check_form(number, record));
    if (record.is_empty()) continue;
    const Nest nest(record);
    TRY(check_bounds(number, "source", source_bytes, record.source_offset, source_reach(nest)));
    TRY(check_bounds(number, "target", target_bytes, record.target_offset, target_reach(nest)));
    writes.push_back(writes_of(static_cast<uint32_t>(number), record));
  }
  return Overlap(name).examine(writes);
}

}  // namespace tensord::tensor
