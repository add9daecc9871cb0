#include "client/plan_json.h"

#include <nlohmann/json.hpp>

#include "base/bytes.h"
#include "base/text.h"
#include "tensor/plan.h"
#include "tensor/view.h"

namespace tensord::client {

using base::Code;
using base::Result;
using nlohmann::json;
using tensor::Copy2D;
using tensor::Index;
using tensor::Strided;
using tensor::Tensor;

namespace {

// Items of the packed buffer lie at multiples of it; what is free behind them is filled with zeros.
constexpr uint64_t kPackedAlignment = 8;
constexpr uint64_t kPackedBytesMax = uint64_t{1} << 62;

json record_json(const char* kind, size_t file, const Copy2D& record) {
  json outer = json::array();
  for (size_t loop = 0; loop < record.outer_count; ++loop) {
    outer.push_back({{"count", record.outer[loop].count},
                     {"source_pitch", record.outer[loop].source_pitch},
                     {"target_pitch", record.outer[loop].target_pitch}});
  }
  return {{"kind", kind},
          {"source", file},
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
  json files = json::array(), items = json::array(), records = json::array(), fills = json::array();
  for (const tensor::IndexFile& file : index.files)
    files.push_back({{"path", file.path}, {"size_bytes", file.size_bytes}});
  std::vector<std::vector<tensor::Wanted>> wanted(index.files.size());  // by the file that is their source
  uint64_t target_bytes = 0;
  for (const std::string& words : views) {
    TRY_ASSIGN(const tensor::ViewItem item, tensor::parse_view_item(words));
    const Tensor* tensor = index.find(item.name);
    if (tensor == nullptr) {
      return base::fail(Code::not_found, "there is no tensor ", base::quoted(item.name),
                        "; `tensord show PATH` lists all ", index.tensors.size());
    }
    TRY_ASSIGN(Strided region, tensor::resolve(*tensor, item.items, tensor->offset));
    Tensor packed{.dtype = tensor->dtype, .shape = region.shape};
    if (!tensor::dtype_bytes(packed.dtype)) packed.dtype = tensor::Dtype::u8;   // such a region is of bytes
    const uint64_t size_bytes = region.element_count() * region.element_bytes;  // at most the tensor's
    items.push_back({{"view", words},
                     {"tensor", item.name},
                     {"dtype", tensor->dtype_text},
                     {"shape", region.shape},
                     {"target_offset", target_bytes},
                     {"size_bytes", size_bytes}});
    wanted[tensor->file].push_back(
        {.label = tensor->name, .from = std::move(region), .to = tensor::whole(packed, target_bytes)});
    const uint64_t end = target_bytes + size_bytes;
    target_bytes = base::align_up(end, kPackedAlignment);
    if (target_bytes > kPackedBytesMax)
      return base::fail(Code::invalid_argument, "the views do not fit one buffer: at ", base::quoted(words));
    if (end < target_bytes)
      fills.push_back(record_json("fill", 0, {.target_offset = end, .row_bytes = target_bytes - end}));
  }
  for (size_t file = 0; file < wanted.size(); ++file) {
    TRY_ASSIGN(const tensor::CopyPlan plan, tensor::compile(wanted[file]));
    for (const Copy2D& record : plan.records) records.push_back(record_json("copy", file, record));
  }
  records.insert(records.end(), fills.begin(), fills.end());
  const json document = {{"files", std::move(files)},
                         {"items", std::move(items)},
                         {"records", std::move(records)},
                         {"target_bytes", target_bytes}};
  return document.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace tensord::client
