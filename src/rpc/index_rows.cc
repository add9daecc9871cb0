#include "rpc/index_rows.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/bytes.h"
#include "protocol/tensord_generated.h"

namespace tensord::rpc {

using base::Code;
using base::fail;

namespace {

constexpr uint64_t kIndexBytesMax = 2'000'000'000;  // FlatBuffers' own limit is 2 GiB
constexpr uint32_t kTableCountMax = 100'000'000;
constexpr int kSeals = F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_WRITE;

base::Status write_all(int fd, const uint8_t* data, size_t size_bytes) {
  while (size_bytes > 0) {
    const ssize_t written = ::write(fd, data, size_bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return base::fail_errno(errno, "write the index to memory");
    data += written;
    size_bytes -= static_cast<size_t>(written);
  }
  return {};
}

tensor::Index to_index(const protocol::IndexRows& rows) {
  tensor::Index index;
  for (const auto* file : *rows.files()) index.files.push_back({file->path()->str(), file->size_bytes()});
  index.tensors.reserve(rows.tensors()->size());
  for (const auto* row : *rows.tensors()) {
    tensor::Tensor tensor;
    tensor.name = row->name()->str();
    tensor.dtype = static_cast<tensor::Dtype>(row->dtype());
    tensor.dtype_text = row->dtype_text()->str();
    if (row->shape() != nullptr) tensor.shape.assign(row->shape()->begin(), row->shape()->end());
    tensor.file = row->file();
    tensor.offset = row->offset();
    tensor.size_bytes = row->size_bytes();
    index.tensors.push_back(std::move(tensor));
  }
  for (const auto* row : *rows.metadata()) index.metadata[row->key()->str()] = row->value()->str();
  return index;
}

// Of types that are no whole number of bytes, only the parser knows how they are packed.
bool shape_fits(const tensor::Tensor& tensor) {
  if (tensor.shape.size() > tensor::kRankMax) return false;
  const std::optional<uint32_t> element_bytes = tensor::dtype_bytes(tensor.dtype);
  if (!element_bytes) return true;
  const std::optional<uint64_t> count = tensor::element_count(tensor.shape);
  return count && base::checked_multiply(*count, *element_bytes) == tensor.size_bytes;
}

bool makes_sense(const tensor::Index& index) {
  uint64_t sum_bytes = 0;
  for (const tensor::IndexFile& file : index.files) {
    if (file.size_bytes > tensor::kIndexBytesMax - sum_bytes) return false;
    sum_bytes += file.size_bytes;
  }
  const auto& tensors = index.tensors;
  const auto out_of_order = [](const tensor::Tensor& a, const tensor::Tensor& b) { return a.name >= b.name; };
  if (std::adjacent_find(tensors.begin(), tensors.end(), out_of_order) != tensors.end()) return false;
  // What tensor::lay_out relies on: every tensor lies in its file, and no byte of a file belongs to two.
  uint32_t file = 0;
  uint64_t used_bytes = 0;  // of the file, by tensors so far
  for (const uint32_t at : tensor::in_file_order(tensors)) {
    const tensor::Tensor& tensor = tensors[at];
    if (tensor.file >= index.files.size() || static_cast<int>(tensor.dtype) >= tensor::kDtypeCount) return false;
    const uint64_t file_bytes = index.files[tensor.file].size_bytes;
    if (tensor.offset > file_bytes || tensor.size_bytes > file_bytes - tensor.offset) return false;
    if (!shape_fits(tensor)) return false;
    if (tensor.size_bytes == 0) continue;
    if (std::exchange(file, tensor.file) != tensor.file) used_bytes = 0;
    if (tensor.offset < used_bytes) return false;
    used_bytes = tensor.offset + tensor.size_bytes;
  }
  return !index.files.empty();
}

}  // namespace

Result<base::Fd> encode_index(const tensor::Index& index) {
  flatbuffers::FlatBufferBuilder builder(1 << 16);
  std::vector<flatbuffers::Offset<protocol::FileRow>> files;
  for (const auto& file : index.files) {
    files.push_back(protocol::CreateFileRow(builder, builder.CreateString(file.path), file.size_bytes));
  }
  std::vector<flatbuffers::Offset<protocol::TensorRow>> tensors;
  tensors.reserve(index.tensors.size());
  for (const auto& tensor : index.tensors) {
    const auto name = builder.CreateString(tensor.name);
    const auto dtype_text = builder.CreateSharedString(tensor.dtype_text);
    const auto shape = builder.CreateVector(tensor.shape);
    tensors.push_back(protocol::CreateTensorRow(builder, name, static_cast<uint8_t>(tensor.dtype), dtype_text, shape,
                                                tensor.file, tensor.offset, tensor.size_bytes));
    if (builder.GetSize() > kIndexBytesMax) return fail(Code::exhausted, "the index is larger than 2 GB");
  }
  std::vector<flatbuffers::Offset<protocol::MetadataRow>> metadata;
  for (const auto& [key, value] : index.metadata) {
    metadata.push_back(protocol::CreateMetadataRow(builder, builder.CreateString(key), builder.CreateString(value)));
  }
  builder.Finish(protocol::CreateIndexRows(builder, builder.CreateVector(files), builder.CreateVector(tensors),
                                           builder.CreateVector(metadata)));
  base::Fd encoded(::memfd_create("tensord-index", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!encoded.valid()) return base::fail_errno(errno, "create memory for the index");
  TRY(write_all(encoded.get(), builder.GetBufferPointer(), builder.GetSize()));
  if (::fcntl(encoded.get(), F_ADD_SEALS, kSeals | F_SEAL_SEAL) != 0) {
    return base::fail_errno(errno, "seal the index");
  }
  return encoded;
}

Result<tensor::Index> decode_index(const base::Fd& fd, uint64_t size_bytes) {
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  const auto rows = base::read_file(fd.get(), kIndexBytesMax, "the index");
  if (seals < 0 || (seals & kSeals) != kSeals || !rows || rows->size() != size_bytes)
    return fail(Code::corrupt, "the daemon's index is not a sealed memory file of the size it tells");
  flatbuffers::Verifier verifier(reinterpret_cast<const uint8_t*>(rows->data()), size_bytes, 64, kTableCountMax);
  if (verifier.VerifyBuffer<protocol::IndexRows>(nullptr)) {
    tensor::Index index = to_index(*flatbuffers::GetRoot<protocol::IndexRows>(rows->data()));
    if (makes_sense(index)) return index;
  }
  return fail(Code::corrupt, "the daemon's index makes no sense");
}

}  // namespace tensord::rpc
