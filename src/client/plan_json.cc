#include "client/plan_json.h"

#include <nlohmann/json.hpp>

#include "base/text.h"
#include "tensor/plan.h"
#include "tensor/view.h"

namespace tensord::client {

using base::Code;
using base::Result;
using nlohmann::json;
using tensor::Copy2D;
using tensor::CopyPlan;
using tensor::Index;
using tensor::Strided;
using tensor::Tensor;

namespace {

struct Slice {
  tensor::ViewItem item;
  const Tensor* tensor;  // of the index
  Strided region;        // of the tensor's file
};

Result<Slice> slice_of(const Index& index, const std::string& words) {
  TRY_ASSIGN(tensor::ViewItem item, tensor::parse_view_item(words));
  const Tensor* tensor = index.find(item.name);
  if (tensor == nullptr) {
    return base::fail(Code::not_found, "there is no tensor ", base::quoted(item.name),
                      "; `tensord show PATH` lists all ", index.tensors.size());
  }
  TRY_ASSIGN(Strided region, tensor::resolve(*tensor, item.items, tensor->offset));
  return Slice{std::move(item), tensor, std::move(region)};
}

// Sources are the index's files, target 0 is the packed buffer.
Result<CopyPlan> packed_plan(const std::vector<Slice>& slices, const tensor::PackedLayout& layout) {
  std::vector<tensor::Wanted> wanted;
  for (size_t at = 0; at < slices.size(); ++at) {
    const auto& [item, tensor, region] = slices[at];
    Tensor packed{.dtype = tensor->dtype, .shape = region.shape};
    if (!tensor::dtype_bytes(packed.dtype)) packed.dtype = tensor::Dtype::u8;  // such a region is of bytes
    wanted.push_back({.label = item.name,
                      .source = tensor->file,
                      .from = region,
                      .to = tensor::whole(packed, layout.items[at].offset)});
  }
  TRY_ASSIGN(CopyPlan plan, tensor::compile(wanted));
  const CopyPlan padding = tensor::pack_padding(layout, 0);
  plan.records.insert(plan.records.end(), padding.records.begin(), padding.records.end());
  return plan;
}

json item_json(const Slice& slice, const tensor::PackedItem& place) {
  return {{"view", tensor::to_text(slice.item)}, {"tensor", slice.item.name},     {"dtype", slice.tensor->dtype_text},
          {"shape", slice.region.shape},         {"target_offset", place.offset}, {"size_bytes", place.size_bytes}};
}

json record_json(const Copy2D& record) {
  json outer = json::array();
  for (size_t loop = 0; loop < record.outer_count; ++loop) {
    outer.push_back({{"count", record.outer[loop].count},
                     {"source_pitch", record.outer[loop].source_pitch},
                     {"target_pitch", record.outer[loop].target_pitch}});
  }
  return {{"kind", record.kind == Copy2D::Kind::fill ? "fill" : "copy"},
          {"source", record.source},
          {"source_offset", record.source_offset},
          {"source_pitch", record.source_pitch},
          {"target_offset", record.target_offset},
          {"target_pitch", record.target_pitch},
          {"row_bytes", record.row_bytes},
          {"row_count", record.row_count},
          {"outer", std::move(outer)}};
}

}  // namespace

Result<std::string> plan_json(const Index& index, const std::vector<std::string>& views) {
  std::vector<Slice> slices;
  std::vector<Strided> regions;
  for (const std::string& words : views) {
    TRY_ASSIGN(slices.emplace_back(), slice_of(index, words));
    regions.push_back(slices.back().region);
  }
  TRY_ASSIGN(const tensor::PackedLayout layout, tensor::pack(regions));
  TRY_ASSIGN(const CopyPlan plan, packed_plan(slices, layout));
  json files = json::array(), items = json::array(), records = json::array();
  for (const tensor::IndexFile& file : index.files)
    files.push_back({{"path", file.path}, {"size_bytes", file.size_bytes}});
  for (size_t at = 0; at < slices.size(); ++at) items.push_back(item_json(slices[at], layout.items[at]));
  for (const Copy2D& record : plan.records) records.push_back(record_json(record));
  const json document = {{"files", std::move(files)},
                         {"items", std::move(items)},
                         {"records", std::move(records)},
                         {"target_bytes", layout.size_bytes}};
  return document.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace tensord::client
