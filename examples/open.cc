// open_cc CHECKPOINT: opens it, lists its files and metadata (on stderr) and its tensors, loads the right half of a
// matrix into memory of its own, and compares that with the zero-copy tensor.
#include <cstdio>
#include <cstring>

#include "tensord/client.h"

namespace {

int complain(const tensord::Error& error) {
  std::fprintf(stderr, "open_cc: %s\n", error.message.c_str());
  return error.code;
}

std::string shape_text(const tensord::Tensor& tensor) {
  std::string text;
  for (const uint64_t extent : tensor.shape()) text += (text.empty() ? "" : ", ") + std::to_string(extent);
  return "[" + text + "]";
}

// The first matrix whose elements are whole bytes and that has a column to leave out.
const tensord::Tensor* find_matrix(const std::vector<tensord::Tensor>& tensors) {
  for (const tensord::Tensor& tensor : tensors) {
    if (tensor.dtype() >= TENSORD_U8 && tensor.shape().size() == 2 && tensor.shape()[0] > 0 && tensor.shape()[1] > 1) {
      return &tensor;
    }
  }
  return nullptr;
}

int load_half(const tensord::Model& model, const tensord::Tensor& matrix) {
  const uint64_t rows = matrix.shape()[0], columns = matrix.shape()[1];
  const uint64_t half = columns / 2;
  const uint64_t element_bytes = matrix.size_bytes() / rows / columns;
  const uint64_t pitch = columns * element_bytes, row_bytes = half * element_bytes;

  const auto right = tensord::Index::parse(":, -" + std::to_string(half) + ":");
  if (!right) return complain(right.error());

  std::vector<std::byte> mine(rows * row_bytes);
  const auto report = model.load_into(
      {{.name = std::string(matrix.name()), .index = *right, .target = {mine.data(), matrix.dtype(), {rows, half}}}});
  if (!report) return complain(report.error());
  for (uint64_t row = 0; row < rows; ++row) {
    const std::byte* theirs = matrix.bytes().data() + row * pitch + (pitch - row_bytes);
    if (std::memcmp(mine.data() + row * row_bytes, theirs, row_bytes) != 0) {
      std::fprintf(stderr, "open_cc: row %llu differs\n", static_cast<unsigned long long>(row));
      return 1;
    }
  }
  std::printf("%s[:, -%llu:]: %llu bytes in %llu records, as in the mapping\n", std::string(matrix.name()).c_str(),
              static_cast<unsigned long long>(half), static_cast<unsigned long long>(report->bytes),
              static_cast<unsigned long long>(report->record_count));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: open_cc FOLDER | FILE...\n");
    return 2;
  }
  const auto model = tensord::Model::open({argv + 1, argv + argc});
  if (!model) return complain(model.error());
  if (const auto ready = model->wait(); !ready) return complain(ready.error());

  for (const std::string& path : model->files()) std::fprintf(stderr, "open_cc: %s\n", path.c_str());
  for (const auto& [key, value] : model->metadata())
    std::fprintf(stderr, "open_cc: %s is %s\n", key.c_str(), value.c_str());
  const std::vector<tensord::Tensor> tensors = model->tensors();
  for (const tensord::Tensor& tensor : tensors) {
    std::printf("%s %s %s\n", std::string(tensor.name()).c_str(), std::string(tensor.dtype_text()).c_str(),
                shape_text(tensor).c_str());
  }
  const tensord::Tensor* matrix = find_matrix(tensors);
  return matrix == nullptr ? 0 : load_half(*model, *matrix);
}
