// Index: the tensors of an artifact and where their bytes lie.
//
//   file 0  [8 B length][header JSON][tensor a][tensor b]....      offsets are from the start of the file
//   file 1  [8 B length][header JSON][tensor c]
//   Index   files {path, size_bytes}   tensors sorted by name {name, dtype, shape, file, offset, size_bytes}
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "tensor/dtype.h"

namespace tensord::tensor {

using base::Result;
using base::Status;

// The most dimensions a tensor may have: numpy's own limit.
inline constexpr size_t kRankMax = 64;

// The most bytes the files of one artifact may have together: the user half of x86-64's 48-bit addresses, so
// that every image can be mapped and no sum of offsets wraps.
inline constexpr uint64_t kIndexBytesMax = uint64_t{1} << 47;

struct Tensor {
  std::string name;
  Dtype dtype = Dtype::opaque;
  std::string dtype_text;       // as the file wrote it; tells opaque types apart
  std::vector<uint64_t> shape;  // elements; empty for a scalar
  uint32_t file = 0;            // position in Index::files
  uint64_t offset = 0;          // of the first byte, from the start of the file
  uint64_t size_bytes = 0;

  bool operator==(const Tensor&) const = default;
};

// The product of a shape, 1 of a scalar's; nullopt where it does not fit.
std::optional<uint64_t> element_count(std::span<const uint64_t> shape);

struct IndexFile {
  std::string path;  // as the client names it; for messages
  uint64_t size_bytes = 0;
  bool operator==(const IndexFile&) const = default;
};

struct Index {
  std::vector<IndexFile> files;
  std::vector<Tensor> tensors;                  // sorted by name, names unique over all files
  std::map<std::string, std::string> metadata;  // __metadata__ of the first file that has one

  // nullptr when there is no such tensor. O(log n).
  const Tensor* find(std::string_view name) const;
  uint64_t payload_bytes() const;  // sum of size_bytes over all tensors
  bool operator==(const Index&) const = default;
};

// Positions of the tensors as their bytes lie: by file, offset, size (empty ones first), then as they came.
std::vector<uint32_t> in_file_order(std::span<const Tensor> tensors);

// The first of two tensors of one name, as they came; nullptr where all names are distinct.
const Tensor* sort_by_name(std::vector<Tensor>& tensors);

// One file's part of an Index.
struct FileTensors {
  std::vector<Tensor> tensors;  // sorted by name; Tensor::file is 0
  std::map<std::string, std::string> metadata;
};

// Joins files (in this order, one part a file) into one Index. Code::corrupt when two files hold one name,
// naming both files; Code::unsupported when they are larger than kIndexBytesMax together.
Result<Index> join_files(std::vector<IndexFile> files, std::vector<FileTensors> parts);

}  // namespace tensord::tensor
