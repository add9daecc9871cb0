#include "tensor/index.h"

#include <algorithm>
#include <tuple>

#include "base/bytes.h"
#include "base/check.h"
#include "base/text.h"

namespace tensord::tensor {

using base::Code;
using base::fail;
using base::quoted;

std::optional<uint64_t> element_count(std::span<const uint64_t> shape) {
  std::optional<uint64_t> count = 1;
  for (const uint64_t extent : shape) {
    if (count) count = base::checked_multiply(*count, extent);
  }
  return count;
}

const Tensor* Index::find(std::string_view name) const {
  const auto place =
      std::lower_bound(tensors.begin(), tensors.end(), name,
                       [](const Tensor& tensor, std::string_view wanted) { return tensor.name < wanted; });
  return place != tensors.end() && place->name == name ? &*place : nullptr;
}

uint64_t Index::payload_bytes() const {
  uint64_t sum = 0;
  for (const Tensor& tensor : tensors) sum += tensor.size_bytes;
  return sum;
}

std::vector<uint32_t> in_file_order(std::span<const Tensor> tensors) {
  // Apart from the tensors, so that sorting stays in few cache lines.
  std::vector<std::tuple<uint32_t, uint64_t, uint64_t, uint32_t>> places;
  places.reserve(tensors.size());
  for (uint32_t at = 0; at < tensors.size(); ++at) {
    places.emplace_back(tensors[at].file, tensors[at].offset, tensors[at].size_bytes, at);
  }
  std::sort(places.begin(), places.end());
  std::vector<uint32_t> order;
  order.reserve(places.size());
  for (const auto& place : places) order.push_back(std::get<3>(place));
  return order;
}

const Tensor* sort_by_name(std::vector<Tensor>& tensors) {
  if (!std::ranges::is_sorted(tensors, {}, &Tensor::name)) std::ranges::stable_sort(tensors, {}, &Tensor::name);
  const auto twin = std::ranges::adjacent_find(tensors, {}, &Tensor::name);
  return twin == tensors.end() ? nullptr : &*twin;
}

Result<Index> join_files(std::vector<IndexFile> files, std::vector<FileTensors> parts) {
  CHECK(files.size() == parts.size());
  Index index;
  uint64_t sum_bytes = 0;
  for (size_t i = 0; i < files.size(); ++i) {
    const auto sum = base::checked_add(sum_bytes, files[i].size_bytes);
    if (!sum || *sum > kIndexBytesMax) {
      return fail(Code::unsupported, files[i].path, ": with this file the artifact is larger than ",
                  base::human_bytes(kIndexBytesMax), ", the most that can be mapped");
    }
    sum_bytes = *sum;
    std::vector<Tensor>& tensors = parts[i].tensors;
    for (Tensor& tensor : tensors) tensor.file = static_cast<uint32_t>(i);
    index.tensors.insert(index.tensors.end(), std::make_move_iterator(tensors.begin()),
                         std::make_move_iterator(tensors.end()));
    if (index.metadata.empty()) index.metadata = std::move(parts[i].metadata);
  }
  if (const Tensor* twin = sort_by_name(index.tensors)) {
    return fail(Code::corrupt, "tensor ", quoted(twin->name), " is in two files: ", files[twin->file].path, " and ",
                files[(twin + 1)->file].path);
  }
  index.files = std::move(files);
  return index;
}

}  // namespace tensord::tensor
