#include <limits>

#include "base/bytes.h"
#include "base/text.h"
#include "tensor/nest.h"
#include "tensor/plan.h"

namespace tensord::tensor {

using base::Code;
using base::fail;
using base::quoted;
using base::text;

namespace {

tl::unexpected<base::Error> refuse(const Wanted& wanted, const auto&... why) {
  return fail(Code::invalid_argument, "copy tensor ", quoted(wanted.label), ": ", why...);
}

std::string shape_text(const std::vector<uint64_t>& shape) {
  std::string out = "[";
  for (size_t at = 0; at < shape.size(); ++at) out += text(at == 0 ? "" : ", ", shape[at]);
  return out + "]";
}

Status check_types(const Wanted& wanted) {
  if (wanted.source_dtype == wanted.target_dtype) {
    if (wanted.from.element_bytes == wanted.to.element_bytes) return {};
    return refuse(wanted, "its elements have ", wanted.from.element_bytes, " bytes, those of the target ",
                  wanted.to.element_bytes);
  }
  if (!can_cast(wanted.source_dtype, wanted.target_dtype)) {
    return refuse(wanted, "there is no cast from ", dtype_name(wanted.source_dtype), " to ",
                  dtype_name(wanted.target_dtype));
  }
  if (dtype_bytes(wanted.source_dtype) == wanted.from.element_bytes &&
      dtype_bytes(wanted.target_dtype) == wanted.to.element_bytes) {
    return {};
  }
  return refuse(wanted, "the element sizes are not those of the types to cast between");
}

Status check_shapes(const Wanted& wanted) {
  const Strided& from = wanted.from;
  const Strided& to = wanted.to;
  if (from.shape != to.shape) {
    return refuse(wanted, "its shape is ", shape_text(from.shape), ", that of the target ", shape_text(to.shape));
  }
  if (from.shape.size() != from.strides.size() || to.shape.size() != to.strides.size()) {
    return refuse(wanted, "a region has not as many strides as dimensions");
  }
  if (from.shape.size() > kRankMax) return refuse(wanted, "it has more than ", kRankMax, " dimensions");
  return {};
}

Status compile_one(const Wanted& wanted, std::vector<Copy2D>& records) {
  TRY(check_types(wanted));
  TRY(check_shapes(wanted));
  const uint64_t element_count = wanted.from.element_count();
  if (element_count == 0) return {};
  const uint64_t element_bytes_max = std::max(wanted.from.element_bytes, wanted.to.element_bytes);
  if (element_count == std::numeric_limits<uint64_t>::max() ||
      !base::checked_multiply(element_count, element_bytes_max)) {
    return refuse(wanted, "shape ", shape_text(wanted.from.shape), " has too many elements to address");
  }
  Copy2D element;
  element.source_offset = wanted.from.offset;
  element.target_offset = wanted.to.offset;
  element.row_bytes = wanted.from.element_bytes;
  if (wanted.source_dtype != wanted.target_dtype) {
    element.source_dtype = wanted.source_dtype;
    element.target_dtype = wanted.target_dtype;
  }
  Nest nest(element);
  for (size_t dimension = wanted.from.shape.size(); dimension-- > 0;) {
    nest.add({wanted.from.shape[dimension], wanted.from.strides[dimension], wanted.to.strides[dimension]});
  }
  if (!source_reach(nest)) return refuse(wanted, "the region to read leaves the address space");
  if (!target_reach(nest)) return refuse(wanted, "the region to write leaves the address space");
  nest.simplify();
  return nest.append_to(records);
}

}  // namespace

Result<CopyPlan> compile(std::span<const Wanted> wanted) {
  CopyPlan plan;
  plan.records.reserve(std::min(wanted.size(), kRecordsMax));
  for (const Wanted& one : wanted) TRY(compile_one(one, plan.records));
  sort_records(plan.records);
  return plan;
}

}  // namespace tensord::tensor
