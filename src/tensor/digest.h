// Digests: XXH3-128 (canonical big-endian form) of 1 MiB leaves, of tensors, of artifacts. Pure.
//
//   leaf digest     XXH3-128 of up to 1 MiB of a tensor's bytes
//   tensor digest   XXH3-128 of its leaf digests in order (of nothing for an empty tensor)
//   artifact id     XXH3-128 over the tensors sorted by name: name, dtype (its text), shape, tensor digest,
//                   each behind its length; lengths and extents are 8 bytes little-endian, a shape's length
//                   counts dimensions. Independent of files, order in files, metadata, block sizes, thread
//                   counts.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "base/result.h"
#include "tensor/index.h"

namespace tensord::tensor {

struct Digest {
  std::array<std::byte, 16> bytes{};
  auto operator<=>(const Digest&) const = default;
  std::string to_text() const;  // 32 hexadecimal digits
};

// Thread safe. Uses the widest vector instructions of this CPU (the result does not depend on them).
Digest hash(std::span<const std::byte> bytes);

// The same hash of bytes that come in pieces.
class Hasher {
 public:
  void begin();  // first
  void add(std::span<const std::byte> bytes);
  Digest end() const;

 private:
  alignas(64) std::array<std::byte, 576> state_;  // XXH3's (tensor/digest_wide.h)
};

Digest tensor_digest(std::span<const Digest> leaves);

// `digests`: one per tensor of `index`, in its order.
Digest artifact_id(const Index& index, std::span<const Digest> digests);

}  // namespace tensord::tensor
