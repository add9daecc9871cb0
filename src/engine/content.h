// Content: what is to be loaded: the index of a set of files and how their image is laid out. Read once, then constant.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/fd.h"
#include "base/result.h"
#include "tensor/blocks.h"
#include "tensor/digest.h"
#include "tensor/index.h"

namespace tensord::engine {

using base::Result;
using base::Status;

// More files than any published checkpoint has; a request over it is refused.
inline constexpr size_t kFileCountMax = 1024;

struct OpenFile {
  base::Fd fd;  // open for reading
  std::string path;
  base::FileIdentity identity;
};

struct Content {
  tensor::Index index;
  uint64_t image_bytes = 0;
  tensor::ImageLayout layout;  // empty when image_bytes is over what read_content was told to lay out
  std::vector<base::FileIdentity> identities;  // one per file
  std::vector<tensor::Digest> layout_digests;  // one per file: which bytes its leaves cover
  int64_t index_ns = 0;                        // how long reading and checking the headers took
};

// Reads and checks the headers of all files. Blocks on the disk: not for the engine's thread. Errors name file
// and tensor. An image over `image_bytes_max` is not laid out: nobody can load it, and a sparse file can claim
// any size.
Result<std::shared_ptr<const Content>> read_content(const std::vector<OpenFile>& files,
                                                    uint64_t image_bytes_max);

// The leaves of file `file` in ImageLayout::leaves: [first, last).
struct LeafRange {
  uint32_t first = 0;
  uint32_t last = 0;
};
LeafRange leaves_of_file(const Content& content, uint32_t file);

}  // namespace tensord::engine
