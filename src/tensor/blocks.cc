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

  void begin_window(const Window& window) {
    close();
    open_ = {.image_offset = window.image_offset, .file_offset = window.file_offset, .file = window.file};
    open_.leaf_begin = leaf_count();
  }

  // Bytes of no tensor up to `file_end`: cut wherever a block is full.
  void add_untyped(uint64_t file_end) {
    while (open_.file_offset + open_.size_bytes < file_end) {
      if (open_.size_bytes == kBlockBytes) close();
      open_.size_bytes = std::min(file_end - open_.file_offset, kBlockBytes);
    }
  }

  void add_tensor(uint32_t tensor, uint64_t size_bytes) {
    for (uint64_t done = 0; done < size_bytes; done += kLeafBytes) {
      const uint64_t leaf_bytes = std::min(kLeafBytes, size_bytes - done);
      if (open_.size_bytes + leaf_bytes > kBlockBytes) close();
      layout_.leaves.push_back({tensor, static_cast<uint32_t>(done / kLeafBytes), open_.image_offset + open_.size_bytes,
                                open_.file_offset + open_.size_bytes, leaf_bytes});
      open_.size_bytes += leaf_bytes;
    }
  }

  // The next block goes on where this one ends.
  void close() {
    if (open_.size_bytes == 0) return;
    open_.leaf_end = leaf_count();
    layout_.blocks.push_back(open_);
    open_.image_offset += open_.size_bytes;
    open_.file_offset += open_.size_bytes;
    open_.size_bytes = 0;
    open_.leaf_begin = open_.leaf_end;
  }

 private:
  uint32_t leaf_count() const { return static_cast<uint32_t>(layout_.leaves.size()); }

  ImageLayout& layout_;
  Block open_;  // not closed yet
};

// In file order, those that have bytes.
std::vector<uint32_t> occupants(const Index& index) {
  std::vector<uint32_t> order = in_file_order(index.tensors);
  std::erase_if(order, [&](uint32_t at) { return index.tensors[at].size_bytes == 0; });
  return order;
}

Windows windows_over(const Index& index, std::span<const uint32_t> order) {
  Windows windows;
  uint64_t used_bytes = 0;  // of the file, by tensors so far
  for (const uint32_t at : order) {
    const Tensor& tensor = index.tensors[at];
    const uint64_t file_bytes = index.files[tensor.file].size_bytes;
    Window* last = windows.list.empty() ? nullptr : &windows.list.back();
    if (last == nullptr || last->file != tensor.file) used_bytes = 0;
    CHECK(tensor.offset >= used_bytes && tensor.offset <= file_bytes);
    CHECK(tensor.size_bytes <= file_bytes - tensor.offset);
    used_bytes = tensor.offset + tensor.size_bytes;
    const uint64_t begin = tensor.offset - tensor.offset % kImageAlignment;
    if (last == nullptr || last->file != tensor.file ||
        begin > last->file_offset + last->size_bytes + kWindowGapBytes) {
      last = &windows.list.emplace_back(Window{tensor.file, begin, windows.image_bytes, 0});
    }
    last->size_bytes = used_bytes - last->file_offset;
    windows.image_bytes = base::align_up(last->image_offset + last->size_bytes, kImageAlignment);
  }
  return windows;
}

}  // namespace

uint64_t Windows::image_offset(const Tensor& tensor) const {
  if (tensor.size_bytes == 0) return 0;
  const auto behind = std::partition_point(list.begin(), list.end(), [&](const Window& window) {
    return std::tie(window.file, window.file_offset) <= std::tie(tensor.file, tensor.offset);
  });
  CHECK(behind != list.begin());
  const Window& window = *std::prev(behind);
  CHECK(window.file == tensor.file && tensor.offset + tensor.size_bytes <= window.file_offset + window.size_bytes);
  return window.image_offset + (tensor.offset - window.file_offset);
}

uint64_t ImageLayout::block_bytes() const {
  uint64_t sum = 0;
  for (const Block& block : blocks) sum += block.size_bytes;
  return sum;
}

ImageLayout::Range ImageLayout::blocks_of(uint64_t image_offset, uint64_t range_bytes) const {
  if (range_bytes == 0) return {};
  const uint64_t image_end = base::checked_add(image_offset, range_bytes).value_or(UINT64_MAX);
  const auto first = std::partition_point(blocks.begin(), blocks.end(), [&](const Block& block) {
    return block.image_offset + block.size_bytes <= image_offset;
  });
  const auto last =
      std::partition_point(first, blocks.end(), [&](const Block& block) { return block.image_offset < image_end; });
  return {static_cast<uint32_t>(first - blocks.begin()), static_cast<uint32_t>(last - blocks.begin())};
}

Windows windows_of(const Index& index) { return windows_over(index, occupants(index)); }

Windows device_windows_of(const Index& index) {
  Windows windows;
  for (const uint32_t at : occupants(index)) {
    const Tensor& tensor = index.tensors[at];
    const uint64_t begin = base::align_up(windows.image_bytes, kDeviceAlignment);
    windows.list.push_back({tensor.file, tensor.offset, begin, tensor.size_bytes});
    windows.image_bytes = begin + tensor.size_bytes;
  }
  return windows;
}

ImageLayout lay_out(const Index& index) {
  const std::vector<uint32_t> order = occupants(index);
  ImageLayout layout;
  layout.windows = windows_over(index, order);
  layout.size_bytes = layout.windows.image_bytes;
  layout.leaves.reserve(index.payload_bytes() / kLeafBytes + order.size());
  layout.blocks.reserve(layout.leaves.capacity() + layout.windows.list.size());
  BlockCutter cutter(layout);
  auto next = order.begin();
  for (const Window& window : layout.windows.list) {
    cutter.begin_window(window);
    const uint64_t file_end = window.file_offset + window.size_bytes;
    for (; next != order.end(); ++next) {
      const Tensor& tensor = index.tensors[*next];
      if (tensor.file != window.file || tensor.offset >= file_end) break;
      cutter.add_untyped(tensor.offset);
      cutter.add_tensor(*next, tensor.size_bytes);
    }
  }
  cutter.close();
  CHECK(next == order.end());
  return layout;
}

}  // namespace tensord::tensor
