// View: which slices of which tensors, as numpy's basic indexing means them. Pure.
//
//   w[3:6, ::-2]  --parse-->  items {slice 3:6, slice ::-2}  --resolve against shape-->  Strided {offset, shape, strides}
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tensor/index.h"

namespace tensord::tensor {

// One item of an index expression, with numpy's rules for defaults, negative numbers and clipping.
struct IndexItem {
  enum class Kind : uint8_t { slice = 0, integer = 1, ellipsis = 2, new_axis = 3 };
  Kind kind = Kind::slice;
  std::optional<int64_t> start, stop, step;  // slice
  int64_t integer = 0;                       // integer: removes its dimension
  bool operator==(const IndexItem&) const = default;
};
using IndexItems = std::vector<IndexItem>;  // empty: the whole tensor

struct ViewItem {
  std::string name;
  IndexItems items;
  bool operator==(const ViewItem&) const = default;
};

// A strided region of memory in bytes. Element (i0, i1, ..) lies at offset + i0 * strides[0] + i1 * strides[1] + ..
struct Strided {
  uint64_t offset = 0;
  std::vector<uint64_t> shape;   // elements
  std::vector<int64_t> strides;  // bytes; may be negative, or 0 (broadcast)
  uint32_t element_bytes = 1;

  uint64_t element_count() const;
  bool operator==(const Strided&) const = default;
};

// The row-major region of a whole tensor that begins at `offset`. Sub-byte and opaque tensors become one dimension of
// bytes (shape {size_bytes}, element_bytes 1).
Strided whole(const Tensor& tensor, uint64_t offset = 0);

// Strides of a row-major tensor in units of `unit`. Those of an empty tensor mean nothing and are 0 where they would
// not fit.
std::vector<int64_t> row_major_strides(const std::vector<uint64_t>& shape, uint32_t unit);

// The region that `items` pick out of `tensor` placed at `offset`, as numpy would. Errors (Code::invalid_argument,
// naming tensor, dimension, index and extent): integer out of range, step 0, more items than dimensions, two
// ellipses; slicing (anything but whole dimensions) of opaque types; of sub-byte types only slices whose first and
// last bit fall on byte boundaries, with step 1, are allowed (the result then is a region of bytes with the last
// dimension counted in bytes).
Result<Strided> resolve(const Tensor& tensor, const IndexItems& items, uint64_t offset = 0);

// The first byte that a region touches, and the one behind the last; of one that is not empty. Nothing overflows.
std::pair<__int128, __int128> reach_of(const Strided& region);

// Bytes of `tensor`, placed at `offset`, as elements of `dtype`: `region` counts from the tensor's first byte, its
// element_bytes are not used. Code::invalid_argument for types of partial bytes and for regions that leave the tensor.
Result<Strided> reinterpret(const Tensor& tensor, Dtype dtype, Strided region, uint64_t offset = 0);

// "w", "w[:, 0:8704]", "w[..., None, -1, ::2]"; the name is everything before the first '[' that closes at the end.
// Code::invalid_argument shows where the text stops making sense.
Result<ViewItem> parse_view_item(std::string_view text);

}  // namespace tensord::tensor
