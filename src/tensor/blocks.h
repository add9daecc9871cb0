// Blocks: how the wanted bytes of an artifact's files lie in its image, and how the image is cut for reading, checking
// and waiting.
//
//   files   [hdr|a........|b..|c...............|d....] [hdr|e.......|f...]     wanted: a, b, d, e
//   image   [    a........ b..][d....][hdr e.......]                           windows, at multiples of 4 KiB
//   leaves       | a0 | a1 |b0| | d0 |     | e0 |                              a tensor's bytes, 1 MiB each
//   blocks  [        ][    ][  ][    ][        ]                               whole leaves, about 1 MiB
//
// A window is a run of a file's pages around wanted bytes: a whole checkpoint is about one window a file, a selection
// of its tensors as many as it has runs.
// Every leaf lies in exactly one block, so that a block can be read, hashed while it is hot in the
// second-level cache, compared, and marked ready, without knowing any other block. Pure: daemon and client
// compute the same cut from the same Index.
#pragma once

#include <cstdint>
#include <vector>

#include "tensor/index.h"

namespace tensord::tensor {

// Size of a digest leaf: 1 MiB, so that one leaf fits the L2 cache of a server core.
inline constexpr uint64_t kLeafBytes = 1 << 20;
// A block is closed before it would exceed this; a single leaf is never cut.
inline constexpr uint64_t kBlockBytes = 1 << 20;
// Windows begin at multiples of this, in the file and in the image (O_DIRECT's granularity on 4096-byte sectors).
inline constexpr uint64_t kImageAlignment = 4096;
// Runs of wanted bytes that lie no further apart are one window: a disk delivers 64 KiB in about the time that another
// request costs.
inline constexpr uint64_t kWindowGapBytes = 64 << 10;

struct Window {
  uint32_t file = 0;
  uint64_t file_offset = 0;   // a multiple of kImageAlignment
  uint64_t image_offset = 0;  // a multiple of kImageAlignment
  uint64_t size_bytes = 0;    // > 0, up to the last wanted byte
};

// Where tensors lie in an image, and what lies there.
struct Windows {
  std::vector<Window> list;  // by file and offset, and so by image offset too
  uint64_t image_bytes = 0;  // a multiple of kImageAlignment

  // Of a tensor of the index that the windows were made from; 0 for one without bytes. O(log n).
  uint64_t image_offset(const Tensor& tensor) const;
};

struct Leaf {
  uint32_t tensor = 0;  // position in Index::tensors
  uint32_t leaf = 0;    // which leaf of the tensor
  uint64_t image_offset = 0;
  uint64_t file_offset = 0;
  uint64_t size_bytes = 0;
};

struct Block {
  uint64_t image_offset = 0;
  uint64_t file_offset = 0;
  uint64_t size_bytes = 0;  // > 0
  uint32_t file = 0;        // a block never spans two windows
  uint32_t leaf_begin = 0;  // its leaves: [leaf_begin, leaf_end) of ImageLayout::leaves
  uint32_t leaf_end = 0;
};

struct ImageLayout {
  Windows windows;
  uint64_t size_bytes = 0;    // of the image, a multiple of kImageAlignment
  std::vector<Leaf> leaves;   // in image order
  std::vector<Block> blocks;  // in image order; together they cover every byte of every window
  uint64_t block_bytes() const;

  // Blocks that hold bytes [offset, offset + size_bytes) of the image: [first, last). O(log n).
  // Empty for size 0.
  struct Range {
    uint32_t first = 0;
    uint32_t last = 0;
  };
  Range blocks_of(uint64_t image_offset, uint64_t size_bytes) const;
};

// The tensors of a file must lie inside it and must not overlap (CHECK; the parsers see to it). The files are at most
// kIndexBytesMax together, as all parsers see to.
Windows windows_of(const Index& index);
// The same in memory of a device, whose kernels want tensors at such multiples: one window for each.
inline constexpr uint64_t kDeviceAlignment = 256;  // as cudaMalloc gives
Windows device_windows_of(const Index& index);

// Bytes that no tensor owns (headers, gaps within a window) are in blocks too, cut anywhere. Takes about 90 bytes of
// memory a MiB of image. As windows_of.
ImageLayout lay_out(const Index& index);

}  // namespace tensord::tensor
