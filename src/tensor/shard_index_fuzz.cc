// Input: the text of a model.safetensors.index.json.
#include <string_view>

#include "base/check.h"
#include "tensor/safetensors.h"

using namespace tensord::tensor;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size_bytes) {
  const auto shards = parse_shard_index({reinterpret_cast<const char*>(data), size_bytes}, "fuzz");
  if (!shards) return 0;
  CHECK(shards->files.size() <= shards->weight_map.size());
  for (const std::string& file : shards->files) {
    CHECK(!file.empty() && file.front() != '/');
    CHECK(("/" + file + "/").find("/../") == std::string::npos);
  }
  const auto status = check_shard_index(*shards, Index{});
  CHECK(status.has_value() == shards->weight_map.empty());
  return 0;
}
