// Input: 8 bytes, taken as a header length and as the size of the data; the rest is the header's JSON.
#include <cstring>
#include <string_view>

#include "base/check.h"
#include "tensor/blocks.h"
#include "tensor/safetensors.h"

using namespace tensord::tensor;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size_bytes) {
  if (size_bytes < kHeaderLengthBytes) return 0;
  const std::span input = std::as_bytes(std::span(data, size_bytes));
  const auto length = parse_header_length(input.first<kHeaderLengthBytes>(), size_bytes, "fuzz");
  if (length) CHECK(*length > 0 && *length <= size_bytes - kHeaderLengthBytes);

  uint64_t data_bytes = 0;
  std::memcpy(&data_bytes, data, sizeof data_bytes);
  data_bytes %= 1 << 28;
  const std::string_view json(reinterpret_cast<const char*>(data) + kHeaderLengthBytes,
                              size_bytes - kHeaderLengthBytes);
  auto part = parse_safetensors(json, size_bytes + data_bytes, "fuzz");
  if (!part) return 0;

  // What was accepted tiles the data, and blocks tile the windows that hold it.
  const Index index = join_files({{"fuzz", size_bytes + data_bytes}}, {*std::move(part)}).value();
  CHECK(index.payload_bytes() == data_bytes);
  uint64_t block_bytes = 0, window_bytes = 0;
  const ImageLayout layout = lay_out(index);
  for (const Block& block : layout.blocks) block_bytes += block.size_bytes;
  for (const Window& window : layout.windows.list) window_bytes += window.size_bytes;
  CHECK(block_bytes == window_bytes && window_bytes >= data_bytes);
  for (const Tensor& tensor : index.tensors) CHECK(index.find(tensor.name) == &tensor);
  return 0;
}
