// Content: what is to be loaded: the index of a set of files and how their image is laid out. Read once, then constant.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "storage/source.h"
#include "tensor/blocks.h"
#include "tensor/digest.h"
#include "tensor/index.h"

namespace tensord::engine {

using base::Result;
using base::Status;

// More files than any published checkpoint has; a request over it is refused.
inline constexpr size_t kFileCountMax = 1024;

// A larger file is not remembered: its record would be more than 64 MiB, and a sparse file can claim any size.
inline constexpr uint64_t kRecordedBytesMax = uint64_t{1} << 42;

using OpenFile = storage::SourceFile;

// All leaves of one file, whichever of its tensors are wanted: what records of the file are kept by.
struct FileLeaves {
  uint32_t count = 0;            // 0 also where the file is larger than kRecordedBytesMax
  tensor::Digest layout_digest;  // over offset and size of each
};

struct Content {
  tensor::Index index;
  uint64_t image_bytes = 0;
  tensor::ImageLayout layout;                  // empty when image_bytes is over what read_content was told to lay out
  std::vector<base::FileIdentity> identities;  // one per file
  std::vector<FileLeaves> file_leaves;         // one per file
  std::vector<uint32_t> first_leaves;          // one per tensor: the number of its first leaf in its file
  int64_t index_ns = 0;                        // how long reading and checking the headers took
  std::shared_ptr<const Content> whole;        // all tensors of the files, where this is a selection; not laid out

  // The number of a leaf of `layout` among all leaves of its file.
  uint32_t number_of(const tensor::Leaf& leaf) const { return first_leaves[leaf.tensor] + leaf.leaf; }
};

// Of an index of all tensors of the files; not laid out.
std::shared_ptr<Content> whole_content(tensor::Index index, std::vector<base::FileIdentity> identities);

struct ContentOrder {
  std::vector<std::string> only;         // names and patterns (tensor/selection.h); empty: all tensors
  std::shared_ptr<const Content> whole;  // of the same files, when it is known: no header is read again
  uint64_t image_bytes_max = 0;
};

// Reads and checks the headers of all files. Blocks on the disk: not for the engine's thread. Errors name file
// and tensor. An image over `image_bytes_max` is not laid out: nobody can load it, and a sparse file can claim
// any size.
Result<std::shared_ptr<const Content>> read_content(const std::vector<OpenFile>& files, const ContentOrder& order);

// The leaves of file `file` in ImageLayout::leaves: [first, last).
tensor::ImageLayout::Range leaves_of_file(const Content& content, uint32_t file);

}  // namespace tensord::engine
