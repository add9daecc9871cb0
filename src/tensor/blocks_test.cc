#include "tensor/blocks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <random>

#include "base/bytes.h"
#include "base/text.h"

namespace tensord::tensor {

using base::text;

namespace {

std::vector<std::string_view> words(std::string_view line, char separator) {
  std::vector<std::string_view> out;
  while (!line.empty()) {
    const size_t end = std::min(line.find(separator), line.size());
    if (end > 0) out.push_back(line.substr(0, end));
    line.remove_prefix(std::min(end + 1, line.size()));
  }
  return out;
}

// One line a file: pieces "name:bytes" in file order; "_" are bytes of no tensor. Sizes may end in M or K.
Index read_index(std::string_view lines) {
  Index index;
  for (const std::string_view line : words(lines, '\n')) {
    uint64_t cursor = 0;
    for (const std::string_view piece : words(line, ' ')) {
      const size_t colon = piece.find(':');
      uint64_t size_bytes = 0;
      std::from_chars(piece.data() + colon + 1, piece.data() + piece.size(), size_bytes);
      if (piece.ends_with('M')) size_bytes <<= 20;
      if (piece.ends_with('K')) size_bytes <<= 10;
      const std::string name(piece.substr(0, colon));
      if (name != "_") {
        const auto file = static_cast<uint32_t>(index.files.size());
        index.tensors.push_back({.name = name,
                                 .dtype = Dtype::u8,
                                 .shape = {size_bytes},
                                 .file = file,
                                 .offset = cursor,
                                 .size_bytes = size_bytes});
      }
      cursor += size_bytes;
    }
    index.files.push_back({text("f", index.files.size()), cursor});
  }
  std::sort(index.tensors.begin(), index.tensors.end(),
            [](const Tensor& a, const Tensor& b) { return a.name < b.name; });
  return index;
}

// One line a block: "offset+size file: leaves".
std::string describe(const Index& index, const ImageLayout& layout) {
  std::string out;
  for (const Block& block : layout.blocks) {
    out += text(block.image_offset, "+", block.size_bytes, " f", block.file, ":");
    for (uint32_t i = block.leaf_begin; i < block.leaf_end; ++i) {
      out += text(" ", index.tensors[layout.leaves[i].tensor].name, layout.leaves[i].leaf);
    }
    out += "\n";
  }
  return out;
}

std::string blocks(std::string_view lines) {
  const Index index = read_index(lines);
  return describe(index, lay_out(index));
}

// One line a window: "file@offset+size -> image offset".
std::string windows(const Index& index) {
  std::string out;
  for (const Window& window : windows_of(index).list) {
    out += text("f", window.file, "@", window.file_offset, "+", window.size_bytes, " -> ", window.image_offset, "\n");
  }
  return out;
}

// A byte for every place of a file, so that an image tells where its bytes are from.
uint64_t mark(uint32_t file, uint64_t offset) { return (uint64_t{file} + 1) << 48 | offset; }

// The window that holds a byte of the image; nullptr between and behind them.
const Window* window_at(const Windows& windows, uint64_t image_offset) {
  for (const Window& window : windows.list) {
    if (image_offset >= window.image_offset && image_offset - window.image_offset < window.size_bytes) return &window;
  }
  return nullptr;
}

// Windows are apart, aligned, no more and no larger than they must be; where a byte lies and what lies there agree.
void expect_windows(const Index& index) {
  const Windows windows = windows_of(index);
  uint64_t cursor = 0;
  const Window* before = nullptr;
  for (const Window& window : windows.list) {
    ASSERT_GT(window.size_bytes, 0u);
    ASSERT_EQ(window.file_offset % kImageAlignment, 0u);
    ASSERT_EQ(window.image_offset, base::align_up(cursor, kImageAlignment));
    cursor = window.image_offset + window.size_bytes;
    if (before != nullptr && before->file == window.file) {
      ASSERT_GT(window.file_offset, before->file_offset + before->size_bytes + kWindowGapBytes);
    }
    ASSERT_EQ(window_at(windows, window.image_offset), &window);
    ASSERT_EQ(window_at(windows, cursor - 1), &window);
    const Window* behind = window_at(windows, cursor);
    ASSERT_TRUE(behind == nullptr || behind == &window + 1);
    before = &window;
  }
  ASSERT_EQ(windows.image_bytes, base::align_up(cursor, kImageAlignment));
  uint64_t edge_count = 0;  // of windows, that are edges of tensors
  for (const Tensor& tensor : index.tensors) {
    if (tensor.size_bytes == 0) continue;
    const uint64_t begin = windows.image_offset(tensor);
    const Window* window = window_at(windows, begin);
    ASSERT_NE(window, nullptr);
    ASSERT_EQ(window, window_at(windows, begin + tensor.size_bytes - 1));
    ASSERT_EQ(mark(window->file, window->file_offset + begin - window->image_offset), mark(tensor.file, tensor.offset));
    if (tensor.offset - window->file_offset < kImageAlignment && begin - window->image_offset < kImageAlignment)
      edge_count += tensor.offset / kImageAlignment * kImageAlignment == window->file_offset ? 1 : 0;
  }
  ASSERT_GE(edge_count, windows.list.size());
}

// Every byte of every window in exactly one block; every leaf in exactly one block; leaves tile their tensors.
void expect_invariants(const Index& index, const ImageLayout& layout) {
  std::vector<uint64_t> covered(layout.windows.list.size(), 0);
  uint64_t cursor = 0;
  uint32_t leaf = 0;
  for (const Block& block : layout.blocks) {
    ASSERT_GT(block.size_bytes, 0u);
    ASSERT_GE(block.image_offset, cursor) << "blocks in image order, apart";
    const Window* window = window_at(layout.windows, block.image_offset);
    ASSERT_NE(window, nullptr);
    ASSERT_EQ(block.file, window->file);
    uint64_t& done = covered[static_cast<size_t>(window - layout.windows.list.data())];
    ASSERT_EQ(block.image_offset, window->image_offset + done);
    ASSERT_EQ(block.file_offset, window->file_offset + done);
    done += block.size_bytes;
    cursor = block.image_offset + block.size_bytes;
    ASSERT_LE(cursor, layout.size_bytes);
    ASSERT_LE(block.size_bytes, kBlockBytes);
    ASSERT_EQ(block.leaf_begin, leaf);
    uint64_t leaf_cursor = block.image_offset;
    for (; leaf < block.leaf_end; ++leaf) {
      const Leaf& piece = layout.leaves[leaf];
      ASSERT_GE(piece.image_offset, leaf_cursor);
      ASSERT_EQ(piece.image_offset - block.image_offset, piece.file_offset - block.file_offset);
      leaf_cursor = piece.image_offset + piece.size_bytes;
    }
    ASSERT_LE(leaf_cursor, cursor);
    const auto [first, last] = layout.blocks_of(block.image_offset, block.size_bytes);
    ASSERT_EQ(&layout.blocks[first], &block);
    ASSERT_EQ(last, first + 1);
  }
  ASSERT_EQ(leaf, layout.leaves.size());
  for (size_t i = 0; i < covered.size(); ++i) ASSERT_EQ(covered[i], layout.windows.list[i].size_bytes);
  ASSERT_EQ(layout.size_bytes, layout.windows.image_bytes);
  std::vector<uint64_t> done(index.tensors.size(), 0);
  for (const Leaf& piece : layout.leaves) {
    const Tensor& tensor = index.tensors[piece.tensor];
    ASSERT_EQ(done[piece.tensor], piece.leaf * kLeafBytes);
    ASSERT_EQ(piece.image_offset, layout.windows.image_offset(tensor) + done[piece.tensor]);
    ASSERT_EQ(piece.file_offset, tensor.offset + done[piece.tensor]);
    ASSERT_EQ(piece.size_bytes, std::min(kLeafBytes, tensor.size_bytes - done[piece.tensor]));
    done[piece.tensor] += piece.size_bytes;
  }
  for (size_t i = 0; i < index.tensors.size(); ++i) ASSERT_EQ(done[i], index.tensors[i].size_bytes);
}

uint64_t random_seed() {
  const char* given = std::getenv("TENSORD_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
}

}  // namespace

TEST(Blocks, whole_leaves_share_a_block_until_it_is_full) {
  EXPECT_EQ(blocks("_:100 a:300 b:600K c:400K d:300K e:124K"),
            "0+1024400 f0: a0 b0 c0\n"
            "1024400+434176 f0: d0 e0\n");
  EXPECT_EQ(blocks("a:512K b:512K c:1"),
            "0+1048576 f0: a0 b0\n"
            "1048576+1 f0: c0\n");
}

TEST(Blocks, a_leaf_is_never_cut) {
  EXPECT_EQ(blocks("_:100 a:2M b:1"),
            "0+100 f0:\n"
            "100+1048576 f0: a0\n"
            "1048676+1048576 f0: a1\n"
            "2097252+1 f0: b0\n");
  EXPECT_EQ(blocks("a:1048577 b:1M c:1"),
            "0+1048576 f0: a0\n"
            "1048576+1 f0: a1\n"
            "1048577+1048576 f0: b0\n"
            "2097153+1 f0: c0\n");
}

TEST(Blocks, bytes_of_no_tensor_within_a_window_are_cut_anywhere) {
  EXPECT_EQ(blocks("_:100 a:1000K _:60K b:1M"),
            "0+1048576 f0: a0\n"
            "1048576+36964 f0:\n"
            "1085540+1048576 f0: b0\n");
}

TEST(Blocks, never_span_two_windows) {
  EXPECT_EQ(blocks("_:2500K a:10 _:1M b:5"),
            "0+10 f0: a0\n"
            "4096+15 f0: b0\n");
}

TEST(Blocks, never_span_two_files_and_files_begin_aligned) {
  EXPECT_EQ(blocks("_:8 a:10\n_:8 b:4088\n_:8 c:1"),
            "0+18 f0: a0\n"
            "4096+4096 f1: b0\n"
            "8192+9 f2: c0\n");
}

TEST(Windows, whole_files_are_one_window_each) {
  EXPECT_EQ(windows(read_index("_:8 a:4090\n_:8 e:0\n_:9000 b:1M c:1 d:7")),
            "f0@0+4098 -> 0\n"
            "f2@8192+1049392 -> 8192\n");
  EXPECT_EQ(windows(Index{}), "");
  EXPECT_EQ(windows_of(Index{}).image_bytes, 0u);
}

TEST(Windows, gaps_up_to_64_KiB_are_read_along) {
  EXPECT_EQ(windows(read_index("a:4096 _:64K b:1")), "f0@0+69633 -> 0\n");
  EXPECT_EQ(windows(read_index("a:4096 _:68K b:1")), "f0@0+4096 -> 0\nf0@73728+1 -> 4096\n");
  EXPECT_EQ(windows(read_index("a:4095 _:68K b:1")), "f0@0+4095 -> 0\nf0@69632+4096 -> 4096\n")
      << "counted between pages";
}

TEST(Windows, lie_at_pages_wherever_tensors_begin) {
  EXPECT_EQ(windows(read_index("_:5000 a:10 _:1M b:9000 _:1M c:4096")),
            "f0@4096+914 -> 0\n"
            "f0@1052672+9914 -> 4096\n"
            "f0@2109440+5818 -> 16384\n");
  const Index index = read_index("_:5000 a:10 _:1M b:9000");
  EXPECT_EQ(windows_of(index).image_offset(*index.find("b")), 4096u + (5010 + (1 << 20)) % 4096);
  EXPECT_EQ(window_at(windows_of(index), 914), nullptr) << "between two windows";
}

TEST(Windows, tensors_without_bytes_need_none) {
  const Index index = read_index("_:8 e:0 _:1M a:1");
  EXPECT_EQ(windows(index), "f0@1048576+9 -> 0\n");
  EXPECT_EQ(windows_of(index).image_offset(*index.find("e")), 0u);
}

TEST(Blocks, tensors_are_visited_by_offset_not_by_name) {
  EXPECT_EQ(blocks("_:8 z:1M a:10 m:20"),
            "0+8 f0:\n"
            "8+1048576 f0: z0\n"
            "1048584+30 f0: a0 m0\n");
}

TEST(Blocks, empty_tensors_have_no_leaves) {
  EXPECT_EQ(blocks("_:8 e:0 a:10 f:0"), "0+18 f0: a0\n");
  EXPECT_EQ(blocks("_:8 e:0"), "");
  EXPECT_EQ(blocks(""), "");
  EXPECT_EQ(lay_out(Index{}).size_bytes, 0u);
}

TEST(Blocks, a_range_finds_the_blocks_that_hold_it) {
  const ImageLayout layout = lay_out(read_index("_:100 a:2M b:1\n_:50 c:10"));
  const auto range = [&](uint64_t offset, uint64_t size_bytes) {
    const auto [first, last] = layout.blocks_of(offset, size_bytes);
    return text(first, "-", last);
  };
  EXPECT_EQ(range(0, 1), "0-1");
  EXPECT_EQ(range(99, 1), "0-1");
  EXPECT_EQ(range(99, 2), "0-2");
  EXPECT_EQ(range(100, 1 << 20), "1-2");
  EXPECT_EQ(range(100, 2 << 20), "1-3");
  EXPECT_EQ(range(0, UINT64_MAX), "0-5");
  EXPECT_EQ(range(5, UINT64_MAX), "0-5");
  EXPECT_EQ(range(2097253, 1), "4-4") << "between two files";
  EXPECT_EQ(range(layout.windows.list[1].image_offset, 60), "4-5");
  EXPECT_EQ(range(layout.size_bytes, 10), "5-5");
  const auto empty = layout.blocks_of(500, 0);
  EXPECT_EQ(empty.first, empty.last);
}

TEST(Blocks, hold_their_invariants_for_random_indices) {
  const uint64_t seed = random_seed();
  SCOPED_TRACE(text("TENSORD_SEED=", seed));
  std::printf("TENSORD_SEED=%llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  const auto below = [&](uint64_t bound) { return random() % bound; };
  for (int round = 0; round < 300; ++round) {
    std::string lines;
    uint32_t name = 0;
    for (uint64_t file = below(4) + 1; file-- > 0;) {
      lines += text("_:", below(8) == 0 ? below(3 << 20) : below(5000) + 8);
      for (uint64_t count = below(12); count-- > 0;) {
        const uint64_t sizes[] = {0, below(100), below(1 << 20), kLeafBytes - 1 + below(3), below(5 << 20)};
        lines += text(below(10) == 0 ? " _:" : text(" t", below(1000), ".", ++name, ":"), sizes[below(5)]);
      }
      lines += "\n";
    }
    const Index index = read_index(lines);
    expect_windows(index);
    expect_invariants(index, lay_out(index));
    Index part = index;  // every selection is as sound
    std::erase_if(part.tensors, [&](const Tensor&) { return below(3) > 0; });
    expect_windows(part);
    expect_invariants(part, lay_out(part));
    ASSERT_FALSE(HasFatalFailure()) << lines;
  }
}

TEST(Blocks, thirty_thousand_leaves_are_laid_out) {
  std::string lines = "_:8";
  for (int i = 0; i < 3000; ++i) lines += text(" t", i * 7919 % 3000, ":10M");
  const Index index = read_index(lines);
  const ImageLayout layout = lay_out(index);
  EXPECT_EQ(layout.leaves.size(), 30'000u);
  expect_invariants(index, layout);
}

}  // namespace tensord::tensor
