#include "engine/content.h"

#include <algorithm>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/text.h"
#include "tensor/safetensors.h"
#include "tensor/selection.h"

namespace tensord::engine {

namespace {

Result<tensor::FileTensors> read_header(const OpenFile& file) {
  std::array<std::byte, tensor::kHeaderLengthBytes> first;
  if (file.identity.size_bytes < first.size()) {
    return base::fail(base::Code::corrupt, file.path, ": ", file.identity.size_bytes,
                      " bytes are too few for a safetensors file");
  }
  TRY(base::read_exactly(file.fd.get(), 0, first, file.path));
  TRY_ASSIGN(const uint64_t header_bytes, tensor::parse_header_length(first, file.identity.size_bytes, file.path));
  std::string json(header_bytes, '\0');
  TRY(base::read_exactly(file.fd.get(), first.size(), std::as_writable_bytes(std::span(json)), file.path));
  return tensor::parse_safetensors(json, file.identity.size_bytes, file.path);
}

// Numbers the leaves of each file, in its order.
void count_leaves(Content& content) {
  const auto& tensors = content.index.tensors;
  const std::vector<uint32_t> order = tensor::in_file_order(tensors);
  content.first_leaves.resize(tensors.size());
  auto next = order.begin();
  for (uint32_t file = 0; file < content.index.files.size(); ++file) {
    FileLeaves& leaves = content.file_leaves.emplace_back();
    if (content.index.files[file].size_bytes > kRecordedBytesMax) continue;
    std::vector<uint64_t> numbers;
    for (; next != order.end() && tensors[*next].file <= file; ++next) {
      const tensor::Tensor& tensor = tensors[*next];
      if (tensor.file < file) continue;
      content.first_leaves[*next] = leaves.count;
      for (uint64_t done = 0; done < tensor.size_bytes; done += tensor::kLeafBytes, ++leaves.count) {
        numbers.push_back(tensor.offset + done);
        numbers.push_back(std::min(tensor::kLeafBytes, tensor.size_bytes - done));
      }
    }
    leaves.layout_digest = tensor::hash(std::as_bytes(std::span(numbers)));
  }
}

Result<std::shared_ptr<Content>> read_whole(const std::vector<OpenFile>& files) {
  std::vector<tensor::IndexFile> named;
  std::vector<tensor::FileTensors> parts;
  for (const OpenFile& file : files) {
    TRY_ASSIGN(tensor::FileTensors part, read_header(file));
    named.push_back({file.path, file.identity.size_bytes});
    parts.push_back(std::move(part));
  }
  TRY_ASSIGN(tensor::Index index, tensor::join_files(std::move(named), std::move(parts)));
  std::vector<base::FileIdentity> identities;
  for (const OpenFile& file : files) identities.push_back(file.identity);
  return whole_content(std::move(index), std::move(identities));
}

Result<std::shared_ptr<Content>> part_of(std::shared_ptr<const Content> whole, const std::vector<std::string>& only) {
  TRY_ASSIGN(const std::vector<uint32_t> positions, tensor::select(whole->index, only));
  auto part = std::make_shared<Content>();
  part->index = tensor::take(whole->index, positions);
  part->identities = whole->identities;
  part->file_leaves = whole->file_leaves;
  for (const uint32_t at : positions) part->first_leaves.push_back(whole->first_leaves[at]);
  part->whole = std::move(whole);
  return part;
}

}  // namespace

std::shared_ptr<Content> whole_content(tensor::Index index, std::vector<base::FileIdentity> identities) {
  auto content = std::make_shared<Content>();
  content->index = std::move(index);
  content->identities = std::move(identities);
  count_leaves(*content);
  return content;
}

tensor::ImageLayout::Range leaves_of_file(const Content& content, uint32_t file) {
  const auto& leaves = content.layout.leaves;
  const auto begins_before = [&](const tensor::Leaf& leaf, uint32_t number) {
    return content.index.tensors[leaf.tensor].file < number;
  };
  const auto first = std::lower_bound(leaves.begin(), leaves.end(), file, begins_before);
  const auto last = std::lower_bound(first, leaves.end(), file + 1, begins_before);
  return {static_cast<uint32_t>(first - leaves.begin()), static_cast<uint32_t>(last - leaves.begin())};
}

Result<std::shared_ptr<const Content>> read_content(const std::vector<OpenFile>& files, const ContentOrder& order) {
  const int64_t begin_ns = base::monotonic_ns();
  std::shared_ptr<Content> content;
  if (order.whole == nullptr) {
    TRY_ASSIGN(content, read_whole(files));
  } else if (order.only.empty()) {
    content = std::make_shared<Content>(*order.whole);
  }
  if (!order.only.empty()) {
    TRY_ASSIGN(content, part_of(content == nullptr ? order.whole : std::move(content), order.only));
  }
  content->image_bytes = tensor::windows_of(content->index).image_bytes;
  if (content->image_bytes <= order.image_bytes_max) content->layout = tensor::lay_out(content->index);
  content->index_ns = base::monotonic_ns() - begin_ns;
  return std::shared_ptr<const Content>(std::move(content));
}

}  // namespace tensord::engine
