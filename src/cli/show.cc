#include "cli/show.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/bytes.h"
#include "base/text.h"
#include "cli/table.h"
#include "tensor/plan.h"
#include "tensor/view.h"

namespace tensord::cli {

using base::Code;
using base::fail;
using base::human_bytes;
using base::text;
using nlohmann::json;
using tensor::Copy2D;
using tensor::CopyPlan;
using tensor::Index;
using tensor::Strided;
using tensor::Tensor;

namespace {

std::string dump(const json& document) {
  return document.dump(-1, ' ', false, json::error_handler_t::replace);
}

std::string shape_text(const std::vector<uint64_t>& shape) {
  std::string out = "[";
  for (const uint64_t extent : shape) out += (out.size() > 1 ? ", " : "") + std::to_string(extent);
  return out + "]";
}

// A tensor's name is shown as it is, unless it would disturb the terminal.
std::string shown_name(const std::string& name) {
  const bool plain =
      std::all_of(name.begin(), name.end(), [](unsigned char c) { return c >= 0x20 && c != 0x7f; });
  return plain ? name : base::quoted(name);
}

std::string files_text(const Index& index) {
  Table table({{"file", Align::right}, {"size", Align::right}, {"path"}});
  for (size_t file = 0; file < index.files.size(); ++file) {
    table.add({text(file), human_bytes(index.files[file].size_bytes), index.files[file].path});
  }
  return table.text();
}

json files_json(const Index& index) {
  json files = json::array();
  for (const tensor::IndexFile& file : index.files) {
    files.push_back({{"path", file.path}, {"size_bytes", file.size_bytes}});
  }
  return files;
}

struct Slice {
  tensor::ViewItem item;
  const Tensor* tensor;  // of the index
  Strided region;        // of the tensor's file
};

Result<Slice> slice_of(const Index& index, const std::string& words) {
  TRY_ASSIGN(tensor::ViewItem item, tensor::parse_view_item(words));
  const Tensor* tensor = index.find(item.name);
  if (tensor == nullptr) {
    return fail(Code::not_found, text("there is no tensor ", base::quoted(item.name),
                                      "; `tensord show PATH` lists all ", index.tensors.size()));
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

Output show_index(const Index& index, const std::string& path) {
  Table table({{"tensor"}, {"dtype"}, {"shape"}, {"size", Align::right}, {"file", Align::right}});
  json tensors = json::array();
  for (const Tensor& tensor : index.tensors) {
    table.add({shown_name(tensor.name), tensor.dtype_text, shape_text(tensor.shape),
               human_bytes(tensor.size_bytes), text(tensor.file)});
    tensors.push_back({{"name", tensor.name},
                       {"dtype", tensor.dtype_text},
                       {"shape", tensor.shape},
                       {"size_bytes", tensor.size_bytes},
                       {"file", tensor.file},
                       {"offset", tensor.offset}});
  }
  std::string out =
      text(path, ": ", index.tensors.size(), index.tensors.size() == 1 ? " tensor, " : " tensors, ",
           human_bytes(index.payload_bytes()), "\n\n", table.text(), "\n", files_text(index));
  for (const auto& [key, value] : index.metadata)
    out += text("metadata  ", base::quoted(key), " = ", base::quoted(value), "\n");
  const json document = {{"path", path},
                         {"payload_bytes", index.payload_bytes()},
                         {"tensor_count", index.tensors.size()},
                         {"files", files_json(index)},
                         {"metadata", index.metadata},
                         {"tensors", std::move(tensors)}};
  return {.json = dump(document), .text = std::move(out)};
}

Result<Output> show_views(const Index& index, const std::string& path,
                          const std::vector<std::string>& views) {
  std::vector<Slice> slices;
  std::vector<Strided> regions;
  for (const std::string& words : views) {
    TRY_ASSIGN(slices.emplace_back(), slice_of(index, words));
    regions.push_back(slices.back().region);
  }
  TRY_ASSIGN(const tensor::PackedLayout layout, tensor::pack(regions));
  TRY_ASSIGN(const CopyPlan plan, packed_plan(slices, layout));

  Table table({{"view"},
               {"dtype"},
               {"shape"},
               {"size", Align::right},
               {"of the tensor", Align::right},
               {"at", Align::right}});
  json items = json::array();
  for (size_t at = 0; at < slices.size(); ++at) {
    const auto& [item, tensor, region] = slices[at];
    const auto& [offset, size_bytes] = layout.items[at];
    const double share = static_cast<double>(size_bytes) / static_cast<double>(tensor->size_bytes);
    table.add({shown_name(tensor::to_text(item)), tensor->dtype_text, shape_text(region.shape),
               human_bytes(size_bytes), decimals(tensor->size_bytes == 0 ? 100 : share * 100, 1) + " %",
               text(offset)});
    items.push_back({{"view", tensor::to_text(item)},
                     {"tensor", item.name},
                     {"dtype", tensor->dtype_text},
                     {"shape", region.shape},
                     {"target_offset", offset},
                     {"size_bytes", size_bytes}});
  }
  json records = json::array();
  for (const Copy2D& record : plan.records) records.push_back(record_json(record));
  std::string out = text(table.text(), "\nplan of a packed copy: ", human_bytes(layout.size_bytes), " in ",
                         records.size(), records.size() == 1 ? " record" : " records",
                         " (source offset -> target offset; s1: is file 1)\n", tensor::to_text(plan));
  if (index.files.size() > 1) out += "\n" + files_text(index);
  const json view = {
      {"items", std::move(items)}, {"target_bytes", layout.size_bytes}, {"records", std::move(records)}};
  const json document = {{"path", path}, {"files", files_json(index)}, {"view", view}};
  return Output{.json = dump(document), .text = std::move(out)};
}

}  // namespace tensord::cli
