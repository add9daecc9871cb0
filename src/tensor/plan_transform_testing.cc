#include <algorithm>
#include <tuple>

#include "base/bytes.h"
#include "base/check.h"
#include "tensor/nest.h"
#include "tensor/plan_transform_testing.h"

namespace tensord::tensor {

using base::Code;
using base::fail;

namespace {

// --- canonical -----------------------------------------------------------------------------------------------------

bool is_single_row(const Copy2D& record) { return record.row_count == 1 && record.outer_count == 0 && !record.casts(); }

uint64_t distance(const Copy2D& record) { return record.target_offset - record.source_offset; }

// Joins neighbours in the list that overlap or touch and have equal distance. Sorted by distance, then offset.
void join_rows(std::vector<Copy2D>& rows) {
  const auto key = [](const Copy2D& a) { return std::tuple(distance(a), a.target_offset, a.row_bytes); };
  std::sort(rows.begin(), rows.end(), [&](const Copy2D& a, const Copy2D& b) { return key(a) < key(b); });
  size_t kept = 0;
  for (size_t at = 1; at < rows.size(); ++at) {
    Copy2D& row = rows[kept];
    const Copy2D& next = rows[at];
    const auto row_end = base::checked_add(row.target_offset, row.row_bytes);
    const auto next_end = base::checked_add(next.target_offset, next.row_bytes);
    if (distance(row) == distance(next) && row_end && next_end && next.target_offset <= *row_end) {
      row.row_bytes = std::max(*row_end, *next_end) - row.target_offset;
    } else {
      rows[++kept] = next;
    }
  }
  if (!rows.empty()) rows.resize(kept + 1);
}

}  // namespace

CopyPlan canonical(CopyPlan plan) {
  CopyPlan out;
  std::vector<Copy2D> rows;
  for (const Copy2D& record : plan.records) {
    if (record.outer_count > kOuterMax) {
      out.records.push_back(record);  // makes no sense: for check_plan to say
      continue;
    }
    if (record.is_empty()) continue;
    Nest nest(record);
    nest.simplify();
    std::vector<Copy2D> one;
    CHECK(nest.append_to(one) && one.size() == 1);  // it had no more loops before
    (is_single_row(one[0]) ? rows : out.records).push_back(one[0]);
  }
  join_rows(rows);
  out.records.insert(out.records.end(), rows.begin(), rows.end());
  std::sort(out.records.begin(), out.records.end());  // so that equal records end up side by side
  sort_records(out.records);
  out.records.erase(std::unique(out.records.begin(), out.records.end()), out.records.end());
  return out;
}

// --- completeness ---------------------------------------------------------------------------------------------------

Status check_complete(const CopyPlan& plan, uint64_t target_bytes) {
  uint64_t written = 0;
  for (const Copy2D& record : plan.records) {
    if (!record.is_empty()) written += record.target_bytes();
  }
  if (written == target_bytes) return {};
  return fail(Code::invalid_argument, "the target has ", target_bytes, " bytes, of which ", written, " are written");
}

// --- window --------------------------------------------------------------------------------------------------------

namespace {

// Cuts nests at the borders of one interval of their target.
class Cut {
 public:
  Cut(Extent inside, std::vector<Copy2D>& out) : inside_(inside), out_(out) {}

  Status cut(const Nest& nest) {
    const Extent extent = *target_reach(nest);
    if (extent.end <= inside_.begin || extent.begin >= inside_.end) return {};
    if (extent.begin >= inside_.begin && extent.end <= inside_.end) return emit(nest);
    if (nest.loop_count == 0) return cut_row(nest);
    Nest rest = nest;
    const Repeat loop = rest.take(nest.loop_count - 1);
    const uint64_t pitch = static_cast<uint64_t>(loop.target_pitch);
    CHECK(loop.target_pitch > 0);
    const Extent first = *target_reach(rest);
    // Iterations [touched, untouched) have bytes inside; of those, [full, partial) have all of them.
    const uint64_t touched = first.end > inside_.begin ? 0 : (inside_.begin - first.end) / pitch + 1;
    const uint64_t untouched = std::min(loop.count, (inside_.end - first.begin - 1) / pitch + 1);
    uint64_t full = first.begin >= inside_.begin ? 0 : (inside_.begin - first.begin - 1) / pitch + 1;
    uint64_t partial = first.end > inside_.end ? 0 : std::min(loop.count, (inside_.end - first.end) / pitch + 1);
    if (full >= partial) full = partial = untouched;
    for (uint64_t index = touched; index < full; ++index) TRY(cut_iteration(rest, loop, index));
    if (full < partial) {
      Nest middle = rest;
      middle.advance(loop, full);
      middle.add({partial - full, loop.source_pitch, loop.target_pitch});
      TRY(emit(middle));
    }
    for (uint64_t index = partial; index < untouched; ++index) TRY(cut_iteration(rest, loop, index));
    return {};
  }

 private:
  Status cut_iteration(Nest rest, const Repeat& loop, uint64_t index) {
    rest.advance(loop, index);
    return cut(rest);
  }

  Status cut_row(Nest row) {
    Copy2D& head = row.head;
    const uint64_t begin = std::max(head.target_offset, inside_.begin);
    const uint64_t end = std::min(head.target_offset + head.row_bytes, inside_.end);
    head.source_offset += begin - head.target_offset;
    head.target_offset = begin;
    head.row_bytes = end - begin;
    return emit(row);
  }

  Status emit(Nest nest) {
    nest.head.target_offset -= inside_.begin;
    nest.simplify();
    return nest.append_to(out_);
  }

  const Extent inside_;
  std::vector<Copy2D>& out_;
};

}  // namespace

CopyPlan window(const CopyPlan& plan, uint64_t offset, uint64_t size_bytes) {
  CopyPlan out;
  const Extent inside{offset, base::checked_add(offset, size_bytes).value_or(~uint64_t{0})};
  if (size_bytes == 0) return out;
  for (const Copy2D& record : plan.records) {
    if (record.is_empty()) continue;
    CHECK(!record.casts());
    Nest nest(record);
    nest.simplify();
    CHECK(Cut(inside, out.records).cut(nest));
  }
  sort_records(out.records);
  return out;
}

}  // namespace tensord::tensor
