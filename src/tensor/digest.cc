#include "tensor/digest.h"

#include "base/bytes.h"
#include "base/check.h"
#include "base/text.h"
#include "tensor/digest_wide.h"

namespace tensord::tensor {

namespace {

const HashFunctions& widest() {
  static const HashFunctions& functions = __builtin_cpu_supports("avx512f") ? hash_avx512
                                          : __builtin_cpu_supports("avx2")  ? hash_avx2
                                                                            : hash_sse2;
  return functions;
}

void append_number(std::string& out, uint64_t number) {
  for (int shift = 0; shift < 64; shift += 8) out += static_cast<char>(number >> shift);
}

void append_counted(std::string& out, std::string_view bytes) {
  append_number(out, bytes.size());
  out += bytes;
}

}  // namespace

std::string Digest::to_text() const { return base::to_hex(bytes.data(), bytes.size()); }

Digest hash(std::span<const std::byte> bytes) {
  Digest digest;
  widest().whole(bytes.data(), bytes.size(), digest.bytes.data());
  return digest;
}

void Hasher::begin() { widest().begin(state_.data()); }
void Hasher::add(std::span<const std::byte> bytes) { widest().add(state_.data(), bytes.data(), bytes.size()); }
Digest Hasher::end() const {
  Digest digest;
  widest().end(state_.data(), digest.bytes.data());
  return digest;
}

Digest tensor_digest(std::span<const Digest> leaves) { return hash(std::as_bytes(leaves)); }

Digest artifact_id(const Index& index, std::span<const Digest> digests) {
  CHECK(digests.size() == index.tensors.size());
  std::string text;
  for (size_t i = 0; i < digests.size(); ++i) {
    const Tensor& tensor = index.tensors[i];
    append_counted(text, tensor.name);
    append_counted(text, tensor.dtype == Dtype::opaque ? tensor.dtype_text : dtype_name(tensor.dtype));
    append_number(text, tensor.shape.size());
    for (const uint64_t extent : tensor.shape) append_number(text, extent);
    append_counted(text, {reinterpret_cast<const char*>(digests[i].bytes.data()), digests[i].bytes.size()});
  }
  return hash(std::as_bytes(std::span(text)));
}

}  // namespace tensord::tensor
