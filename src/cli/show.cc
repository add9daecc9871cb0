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

// Where `from` lies when it is packed row-major at `offset`.
Strided packed_at(const Strided& from, uint64_t offset) {
  Strided to = from;
  to.offset = offset;
  auto stride = static_cast<int64_t>(from.element_bytes);
  for (size_t at = to.shape.size(); at-- > 0;) {
    to.strides[at] = stride;
    stride *= static_cast<int64_t>(std::max<uint64_t>(to.shape[at], 1));
  }
  return to;
}

struct PackedView {
  std::vector<tensor::ViewItem> items;
  std::vector<const Tensor*> tensors;  // of the index, one an item
  std::vector<Strided> regions;        // of the tensors' files
  tensor::PackedLayout layout;
  CopyPlan plan;  // sources are the index's files, target 0 is the buffer
};

Result<PackedView> pack_views(const Index& index, const std::vector<std::string>& views) {
  PackedView view;
  for (const std::string& words : views) {
    TRY_ASSIGN(tensor::ViewItem item, tensor::parse_view_item(words));
    const Tensor* tensor = index.find(item.name);
    if (tensor == nullptr) {
      return fail(Code::not_found, text("there is no tensor ", base::quoted(item.name),
                                        "; `tensord show PATH` lists all ", index.tensors.size()));
    }
    TRY_ASSIGN(Strided region, tensor::resolve(*tensor, item.items, tensor->offset));
    view.items.push_back(std::move(item));
    view.tensors.push_back(tensor);
    view.regions.push_back(std::move(region));
  }
  TRY_ASSIGN(view.layout, tensor::pack(view.regions));
  std::vector<tensor::Wanted> wanted;
  for (size_t at = 0; at < view.items.size(); ++at) {
    wanted.push_back({.label = view.items[at].name,
                      .source = view.tensors[at]->file,
                      .from = view.regions[at],
                      .to = packed_at(view.regions[at], view.layout.items[at].offset)});
  }
  TRY_ASSIGN(view.plan, tensor::compile(wanted));
  const CopyPlan padding = tensor::pack_padding(view.layout, 0);
  view.plan.records.insert(view.plan.records.end(), padding.records.begin(), padding.records.end());
  return view;
}

std::string view_text(const PackedView& view) {
  Table table({{"view"},
               {"dtype"},
               {"shape"},
               {"size", Align::right},
               {"of the tensor", Align::right},
               {"at", Align::right}});
  for (size_t at = 0; at < view.items.size(); ++at) {
    const Tensor& tensor = *view.tensors[at];
    const tensor::PackedItem& place = view.layout.items[at];
    const double share = tensor.size_bytes == 0
                             ? 1.0
                             : static_cast<double>(place.size_bytes) / static_cast<double>(tensor.size_bytes);
    table.add({shown_name(tensor::to_text(view.items[at])), tensor.dtype_text,
               shape_text(view.regions[at].shape), human_bytes(place.size_bytes),
               decimals(share * 100, 1) + " %", text(place.offset)});
  }
  return table.text();
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

json view_json(const PackedView& view) {
  json items = json::array();
  for (size_t at = 0; at < view.items.size(); ++at) {
    items.push_back({{"view", tensor::to_text(view.items[at])},
                     {"tensor", view.items[at].name},
                     {"dtype", view.tensors[at]->dtype_text},
                     {"shape", view.regions[at].shape},
                     {"target_offset", view.layout.items[at].offset},
                     {"size_bytes", view.layout.items[at].size_bytes}});
  }
  json records = json::array();
  for (const Copy2D& record : view.plan.records) records.push_back(record_json(record));
  return {
      {"items", std::move(items)}, {"target_bytes", view.layout.size_bytes}, {"records", std::move(records)}};
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
  TRY_ASSIGN(const PackedView view, pack_views(index, views));
  const size_t records = view.plan.records.size();
  std::string out = text(view_text(view), "\nplan of a packed copy: ", human_bytes(view.layout.size_bytes),
                         " in ", records, records == 1 ? " record" : " records",
                         " (source offset -> target offset; s1: is file 1)\n", tensor::to_text(view.plan));
  if (index.files.size() > 1) out += "\n" + files_text(index);
  const json document = {{"path", path}, {"files", files_json(index)}, {"view", view_json(view)}};
  return Output{.json = dump(document), .text = std::move(out)};
}

}  // namespace tensord::cli
