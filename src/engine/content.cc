#include "engine/content.h"

#include <algorithm>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/text.h"
#include "tensor/safetensors.h"

namespace tensord::engine {

namespace {

Result<tensor::FileTensors> read_header(const OpenFile& file) {
  std::array<std::byte, tensor::kHeaderLengthBytes> first;
  if (file.identity.size_bytes < first.size()) {
    return base::fail(base::Code::corrupt, base::text(file.path, ": ", file.identity.size_bytes,
                                                      " bytes are too few for a safetensors file"));
  }
  TRY(base::read_exactly(file.fd.get(), 0, first, file.path));
  TRY_ASSIGN(const uint64_t header_bytes,
             tensor::parse_header_length(first, file.identity.size_bytes, file.path));
  std::string json(header_bytes, '\0');
  TRY(base::read_exactly(file.fd.get(), first.size(), std::as_writable_bytes(std::span(json)), file.path));
  return tensor::parse_safetensors(json, file.identity.size_bytes, file.path);
}

void append_number(std::string& text, uint64_t number) {
  text.append(reinterpret_cast<const char*>(&number), sizeof number);
}

tensor::Digest layout_digest(const Content& content, uint32_t file) {
  const auto [first, last] = leaves_of_file(content, file);
  std::string text;
  for (uint32_t at = first; at < last; ++at) {
    const tensor::Leaf& leaf = content.layout.leaves[at];
    append_number(text, leaf.image_offset - content.layout.file_offsets[file]);
    append_number(text, leaf.size_bytes);
  }
  return tensor::hash(std::as_bytes(std::span(text)));
}

}  // namespace

LeafRange leaves_of_file(const Content& content, uint32_t file) {
  const auto& leaves = content.layout.leaves;
  const auto begins_before = [&](const tensor::Leaf& leaf, uint32_t number) {
    return content.index.tensors[leaf.tensor].file < number;
  };
  const auto first = std::lower_bound(leaves.begin(), leaves.end(), file, begins_before);
  const auto last = std::lower_bound(first, leaves.end(), file + 1, begins_before);
  return {static_cast<uint32_t>(first - leaves.begin()), static_cast<uint32_t>(last - leaves.begin())};
}

Result<std::shared_ptr<const Content>> read_content(const std::vector<OpenFile>& files,
                                                    uint64_t image_bytes_max) {
  const int64_t begin_ns = base::monotonic_ns();
  std::vector<tensor::IndexFile> named;
  std::vector<tensor::FileTensors> parts;
  for (const OpenFile& file : files) {
    TRY_ASSIGN(tensor::FileTensors part, read_header(file));
    named.push_back({file.path, file.identity.size_bytes});
    parts.push_back(std::move(part));
  }
  auto content = std::make_shared<Content>();
  TRY_ASSIGN(content->index, tensor::join_files(std::move(named), std::move(parts)));
  for (const OpenFile& file : files) {
    content->identities.push_back(file.identity);
    content->image_bytes += base::align_up(file.identity.size_bytes, tensor::kImageAlignment);
  }
  if (content->image_bytes <= image_bytes_max) {
    content->layout = tensor::lay_out(content->index);
    for (uint32_t file = 0; file < files.size(); ++file) {
      content->layout_digests.push_back(layout_digest(*content, file));
    }
  }
  content->index_ns = base::monotonic_ns() - begin_ns;
  return std::shared_ptr<const Content>(std::move(content));
}

}  // namespace tensord::engine
