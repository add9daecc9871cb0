// Reading the safetensors format (https://github.com/huggingface/safetensors, "Format"): pure, bytes in,
// Index out. Every field is hostile until checked.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tensor/index.h"

namespace tensord::tensor {

// The first 8 bytes of a file: little-endian size of the JSON header that follows.
inline constexpr uint64_t kHeaderLengthBytes = 8;
// The format's own limit.
inline constexpr uint64_t kHeaderBytesMax = 100'000'000;
// Tensors, metadata entries and weight_map entries of one file, each: ten times the largest checkpoints, so
// that a hostile header of kHeaderBytesMax costs hundreds of MB of memory at most, not many GB.
inline constexpr uint64_t kEntryCountMax = 1'000'000;

// Size in bytes of the JSON header. Code::corrupt, naming `path`: file too short for it, 0, over
// kHeaderBytesMax, or past the end of the file.
Result<uint64_t> parse_header_length(std::span<const std::byte, kHeaderLengthBytes> first, uint64_t file_size_bytes,
                                     const std::string& path);

// `json`: the header without its length; JSON white space around the object is allowed, as writers align
// data with it. Refused with Code::corrupt, naming path, tensor and what is wrong: not UTF-8, not an object
// that begins with a brace, a duplicate name, field or metadata key, unknown or missing fields, begin > end,
// range past the end of the file, shape x dtype != range or no whole number of bytes, products that
// overflow, overlapping ranges, holes between tensors (bytes no tensor owns), bytes left over at the end of
// the file, over kRankMax dimensions, over kEntryCountMax entries, metadata that is neither null nor string
// to string. A dtype that is not known is kept as Dtype::opaque; its range may have any length.
Result<FileTensors> parse_safetensors(std::string_view json, uint64_t file_size_bytes, const std::string& path);

// model.safetensors.index.json.
struct ShardIndex {
  std::set<std::string> files;
  std::map<std::string, std::string> weight_map;  // tensor -> file name
};

// Code::corrupt, naming `path`: not UTF-8, no weight_map object or two, a tensor twice, a file name that is
// empty, absolute, has a `..` component or a NUL (files must lie in the index's own folder or below it), over
// kHeaderBytesMax or kEntryCountMax. Everything beside weight_map is ignored.
Result<ShardIndex> parse_shard_index(std::string_view json, const std::string& path);

// Whether an Index holds all tensors of its files.
enum class Holds : uint8_t { all, some };

// Code::corrupt when a tensor of the shard index is not in the file it names, or, where the index holds all, is in none;
// tensors the shard index does not mention are kept. File names are matched with the ends of Index::files' paths, whole components only.
Status check_shard_index(const ShardIndex& shards, const Index& index, Holds holds = Holds::all);

}  // namespace tensord::tensor
