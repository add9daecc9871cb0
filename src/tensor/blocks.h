// Blocks: how the image of an artifact's files is cut for reading, checking and waiting.
//
//   image   [file 0 ........................][pad][file 1 ...............] files begin at multiples of 4 KiB
//   leaves    hdr| a0 | a1 |a2|b|c| d0 | d1                              a tensor's bytes, 1 MiB each
//   blocks  [      ][    ][       ][    ][    ]                          whole leaves, about 1 MiB
//
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
// Images of files keep their file's offsets modulo this (O_DIRECT's granularity on 4096-byte sectors).
inline constexpr uint64_t kImageAlignment = 4096;

struct Leaf {
  uint32_t tensor = 0;  // position in Index::tensors
  uint32_t leaf = 0;    // which leaf of the tensor
  uint64_t image_offset = 0;
  uint64_t size_bytes = 0;
};

struct Block {
  uint64_t image_offset = 0;
  uint64_t size_bytes = 0;  // > 0
  uint32_t file = 0;        // a block never spans two files
  uint32_t leaf_begin = 0;  // its leaves: [leaf_begin, leaf_end) of ImageLayout::leaves
  uint32_t leaf_end = 0;
};

struct ImageLayout {
  std::vector<uint64_t> file_offsets;  // image offset of each file's byte 0
  uint64_t size_bytes = 0;             // of the image, a multiple of kImageAlignment
  std::vector<Leaf> leaves;            // in image order
  std::vector<Block> blocks;           // in image order; together they cover every byte of every file

  uint64_t tensor_offset(const Tensor& tensor) const { return file_offsets[tensor.file] + tensor.offset; }
  // Blocks that hold bytes [offset, offset + size_bytes) of the image: [first, last). O(log n).
  // Empty for size 0.
  struct Range {
    uint32_t first = 0;
    uint32_t last = 0;
  };
  Range blocks_of(uint64_t image_offset, uint64_t size_bytes) const;
};

// The image offset of each file's byte 0, and behind the last one the size of the image. The files are at most
// kIndexBytesMax together, as all parsers see to.
std::vector<uint64_t> file_offsets(const Index& index);

// The tensors of a file must lie inside it and must not overlap (CHECK; the parsers see to it). Bytes that
// no tensor owns (headers, alignment gaps) are in blocks too, cut anywhere. Takes about 70 bytes of memory a
// MiB of image.
ImageLayout lay_out(const Index& index);

}  // namespace tensord::tensor
