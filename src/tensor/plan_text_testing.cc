#include "base/text.h"
#include "tensor/plan_testing.h"

namespace tensord::tensor {

using base::text;

namespace {

std::string counted(uint64_t count, std::string_view noun) { return text(count, " ", noun, count == 1 ? "" : "s"); }

std::string record_text(const Copy2D& record) {
  const bool has_rows = record.row_count != 1;
  std::string out = text(record.source_offset);
  if (has_rows) out += text(" pitch ", record.source_pitch);
  out += text(" -> ", record.target_offset);
  if (has_rows) out += text(" pitch ", record.target_pitch);
  out += text("   ", counted(record.row_count, "row"), " x ", record.row_bytes, " B");
  for (size_t at = 0; at < record.outer_count; ++at) {
    const Repeat& loop = record.outer[at];
    out += text("   x ", loop.count, " pitch ", loop.source_pitch, " -> ", loop.target_pitch);
  }
  if (record.casts()) out += text("   ", dtype_name(record.source_dtype), " as ", dtype_name(record.target_dtype));
  return out + "\n";
}

}  // namespace

std::string to_text(const CopyPlan& plan) {
  std::string out;
  for (const Copy2D& record : plan.records) out += record_text(record);
  return out;
}

}  // namespace tensord::tensor
