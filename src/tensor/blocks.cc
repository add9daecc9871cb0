#include "tensor/blocks.h"

#include <algorithm>
#include <tuple>

#include "base/bytes.h"
#include "base/check.h"

namespace tensord::tensor {

namespace {

// Grows the layout piece by piece, in image order.
class BlockCutter {
 public:
  explicit BlockCutter(ImageLayout& layout) : layout_(layout) {}

  void begin_file(uint32_t file, uint64_t image_offset) {
    close();
    file_ = file;
    cursor_ = image_offset;
  }

  // Bytes of no tensor up to `image_end`: cut wherever a block is full.
  void add_untyped(uint64_t image_end) {
    while (cursor_ < image_end) {
      if (open_bytes_ == kBlockBytes) close();
      const uint64_t piece = std::min(image_end - cursor_, kBlockBytes - open_bytes_);
      open_bytes_ += piece;
      cursor_ += piece;
    }
  }

  void add_tensor(uint32_t tensor, uint64_t size_bytes) {
    for (uint64_t done = 0; done < size_bytes; done += kLeafBytes) {
      const uint64_t leaf_bytes = std::min(kLeafBytes, size_bytes - done);
      if (open_bytes_ + leaf_bytes > kBlockBytes) close();
      layout_.leaves.push_back(Leaf{tensor, static_cast<uint32_t>(done / kLeafBytes), cursor_, leaf_bytes});
      open_bytes_ += leaf_bytes;
      cursor_ += leaf_bytes;
    }
  }

  void close() {
    const auto leaf_end = static_cast<uint32_t>(layout_.leaves.size());
    if (open_bytes_ > 0) {
      layout_.blocks.push_back(Block{cursor_ - open_bytes_, open_bytes_, file_, leaf_begin_, leaf_end});
    }
    open_bytes_ = 0;
    leaf_begin_ = leaf_end;
  }

 private:
  ImageLayout& layout_;
  uint32_t file_ = 0;
  uint64_t cursor_ = 0;      // image offset behind the last piece
  uint64_t open_bytes_ = 0;  // of the block that is not closed yet; it ends at cursor_
  uint32_t leaf_begin_ = 0;  // of that block
};

// Where a tensor begins, apart from the tensor, so that sorting stays in few cache lines.
struct Place {
  uint32_t file = 0;
  uint32_t tensor = 0;
  uint64_t offset = 0;
};

std::vector<Place> places_in_order(const std::vector<Tensor>& tensors) {
  std::vector<Place> places;
  places.reserve(tensors.size());
  for (uint32_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].size_bytes > 0) places.push_back({tensors[i].file, i, tensors[i].offset});
  }
  std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) {
    return std::tie(a.file, a.offset) < std::tie(b.file, b.offset);
  });
  return places;
}

}  // namespace

ImageLayout::Range ImageLayout::blocks_of(uint64_t image_offset, uint64_t range_bytes) const {
  if (range_bytes == 0) return {};
  const uint64_t image_end = base::checked_add(image_offset, range_bytes).value_or(UINT64_MAX);
  const auto first = std::partition_point(blocks.begin(), blocks.end(), [&](const Block& block) {
    return block.image_offset + block.size_bytes <= image_offset;
  });
  const auto last = std::partition_point(first, blocks.end(),
                                         [&](const Block& block) { return block.image_offset < image_end; });
  return {static_cast<uint32_t>(first - blocks.begin()), static_cast<uint32_t>(last - blocks.begin())};
}

std::vector<uint64_t> file_offsets(const Index& index) {
  std::vector<uint64_t> offsets = {0};
  for (const IndexFile& file : index.files) {
    offsets.push_back(base::align_up(offsets.back() + file.size_bytes, kImageAlignment));
  }
  return offsets;
}

ImageLayout lay_out(const Index& index) {
  const std::vector<Place> places = places_in_order(index.tensors);
  ImageLayout layout;
  layout.file_offsets = file_offsets(index);
  layout.size_bytes = layout.file_offsets.back();
  layout.file_offsets.pop_back();
  layout.leaves.reserve(index.payload_bytes() / kLeafBytes + places.size());
  layout.blocks.reserve(layout.leaves.capacity() + index.files.size());
  BlockCutter cutter(layout);
  auto next = places.begin();
  for (uint32_t file = 0; file < index.files.size(); ++file) {
    const uint64_t file_begin = layout.file_offsets[file];
    const uint64_t file_bytes = index.files[file].size_bytes;
    cutter.begin_file(file, file_begin);
    uint64_t used_bytes = 0;  // of the file, by tensors so far
    for (; next != places.end() && next->file == file; ++next) {
      const uint64_t tensor_bytes = index.tensors[next->tensor].size_bytes;
      CHECK(next->offset >= used_bytes && next->offset <= file_bytes);
      CHECK(tensor_bytes <= file_bytes - next->offset);
      cutter.add_untyped(file_begin + next->offset);
      cutter.add_tensor(next->tensor, tensor_bytes);
      used_bytes = next->offset + tensor_bytes;
    }
    cutter.add_untyped(file_begin + file_bytes);
  }
  cutter.close();
  CHECK(next == places.end());
  return layout;
}

}  // namespace tensord::tensor
