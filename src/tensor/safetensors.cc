#include "tensor/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <optional>

#include "base/bytes.h"
#include "base/text.h"
#include "tensor/json.h"

namespace tensord::tensor {

using base::checked_multiply;
using base::Code;
using base::fail;
using base::quoted;
using base::text;

namespace {

constexpr std::string_view kMetadataKey = "__metadata__";

// The header's JSON becomes tensors, one after another; each is checked by itself as soon as its object ends.
//
//   outside { top  "w": { tensor  "dtype": ..  "shape": [ shape ]  "data_offsets": [ offsets ] }
//                  "__metadata__": { metadata  "key": "value" } }
class HeaderReader final : public JsonEvents {
 public:
  HeaderReader(const std::string& path, uint64_t data_begin, uint64_t data_bytes)
      : path_(path), data_begin_(data_begin), data_bytes_(data_bytes) {}

  Status object_begin() override {
    if (place_ == Place::outside) return enter(Place::top);
    if (place_ != Place::top) return unexpected("an object");
    if (name_ == kMetadataKey) {
      if (metadata_seen_) return refuse("a duplicate __metadata__");
      metadata_seen_ = true;
      return enter(Place::metadata);
    }
    if (part_.tensors.size() == kEntryCountMax) return refuse("over ", kEntryCountMax, " tensors");
    tensor_ = Tensor{};
    seen_ = {};
    offsets_.clear();
    return enter(Place::tensor);
  }

  Status key(std::string name) override {
    if (place_ == Place::tensor) return begin_field(name);
    (place_ == Place::metadata ? metadata_name_ : name_) = std::move(name);
    return {};
  }

  Status object_end() override {
    if (place_ == Place::tensor) TRY(end_tensor());
    return enter(place_ == Place::top ? Place::outside : Place::top);
  }

  Status array_begin() override {
    if (place_ == Place::tensor && field_ == Field::shape) return enter(Place::shape);
    if (place_ == Place::tensor && field_ == Field::data_offsets) return enter(Place::offsets);
    return unexpected("an array");
  }

  Status array_end() override { return enter(Place::tensor); }

  Status string(std::string value) override {
    if (place_ == Place::metadata) return add_metadata(std::move(value));
    if (place_ != Place::tensor || field_ != Field::dtype) return unexpected("a string");
    tensor_.dtype = parse_dtype(value);
    tensor_.dtype_text = std::move(value);
    return {};
  }

  Status natural(uint64_t value) override {
    if (place_ == Place::shape) {
      if (tensor_.shape.size() == kRankMax) return refuse_tensor("over ", kRankMax, " dimensions");
      tensor_.shape.push_back(value);
      return {};
    }
    if (place_ == Place::offsets) {
      if (offsets_.size() == 2) return refuse_tensor("data_offsets has more than 2 numbers");
      offsets_.push_back(value);
      return {};
    }
    return unexpected("a number");
  }

  Status null() override {
    if (place_ != Place::top || name_ != kMetadataKey) return unexpected("null");
    if (metadata_seen_) return refuse("a duplicate __metadata__");
    metadata_seen_ = true;
    return {};
  }

  Status other(std::string_view what) override { return unexpected(what); }

  FileTensors take() && { return std::move(part_); }

 private:
  enum class Place : uint8_t { outside, top, tensor, shape, offsets, metadata };
  enum class Field : uint8_t { dtype = 0, shape = 1, data_offsets = 2 };
  static constexpr std::array<std::string_view, 3> kFields{"dtype", "shape", "data_offsets"};
  static constexpr std::array<std::string_view, 3> kFieldTypes{"a string", "an array of sizes",
                                                               "an array of 2 numbers"};

  Status enter(Place place) {
    place_ = place;
    return {};
  }
  Status refuse(const auto&... what) const { return fail(Code::corrupt, path_, ": header has ", what...); }
  Status refuse_tensor(const auto&... what) const {
    return fail(Code::corrupt, path_, ": tensor ", quoted(name_), ": ", what...);
  }

  // A value of the wrong kind, `what`, at the present place.
  Status unexpected(std::string_view what) const {
    switch (place_) {
      case Place::outside:
        return fail(Code::corrupt, path_, ": header is ", what, ", not an object");
      case Place::top:
        if (name_ == kMetadataKey) return refuse("a __metadata__ that is ", what, ", not an object");
        return refuse_tensor("is ", what, ", not an object");
      case Place::tensor: {
        const auto number = static_cast<size_t>(field_);
        return refuse_tensor(kFields[number], " is ", what, ", not ", kFieldTypes[number]);
      }
      case Place::shape:
      case Place::offsets:
        return refuse_tensor(kFields[static_cast<size_t>(field_)], " holds ", what, ", not a natural number");
      case Place::metadata:
        return refuse("a __metadata__ whose ", quoted(metadata_name_), " is ", what, ", not a string");
    }
    return refuse(what);
  }

  Status begin_field(std::string_view name) {
    const auto place = std::find(kFields.begin(), kFields.end(), name);
    if (place == kFields.end()) return refuse_tensor("unknown field ", quoted(name));
    const auto number = static_cast<size_t>(place - kFields.begin());
    if (seen_[number]) return refuse_tensor("duplicate field ", quoted(name));
    seen_[number] = true;
    field_ = static_cast<Field>(number);
    return {};
  }

  Status add_metadata(std::string value) {
    if (part_.metadata.size() == kEntryCountMax) return refuse("over ", kEntryCountMax, " metadata entries");
    if (!part_.metadata.emplace(metadata_name_, std::move(value)).second) {
      return refuse("a duplicate metadata key ", quoted(metadata_name_));
    }
    return {};
  }

  Status end_tensor() {
    for (size_t i = 0; i < kFields.size(); ++i) {
      if (!seen_[i]) return refuse_tensor(kFields[i], " is missing");
    }
    if (offsets_.size() != 2) return refuse_tensor("data_offsets has ", offsets_.size(), " of 2 numbers");
    const uint64_t begin = offsets_[0];
    const uint64_t end = offsets_[1];
    const std::string range = text("data_offsets [", begin, ", ", end, "]");
    if (begin > end) return refuse_tensor(range, " end before they begin");
    if (end > data_bytes_) {
      return refuse_tensor(range, " end past the file's ", data_bytes_, " bytes of data; is it cut short?");
    }
    TRY(check_shape(end - begin));
    tensor_.name = name_;
    tensor_.offset = data_begin_ + begin;
    tensor_.size_bytes = end - begin;
    part_.tensors.push_back(std::move(tensor_));
    return {};
  }

  Status check_shape(uint64_t range_bytes) const {
    std::optional<uint64_t> product = 1;
    for (const uint64_t extent : tensor_.shape) {
      if (product) product = checked_multiply(*product, extent);
    }
    if (!product) return refuse_tensor("the product of its shape does not fit 64 bits");
    if (tensor_.dtype == Dtype::opaque) return {};
    const auto bits = checked_multiply(*product, dtype_bits(tensor_.dtype));
    if (!bits) return refuse_tensor("its size in bits does not fit 64 bits");
    const std::string elements = text(*product, " elements of ", tensor_.dtype_text);
    if (*bits % 8 != 0) return refuse_tensor(elements, " are not a whole number of bytes");
    if (*bits / 8 != range_bytes) {
      return refuse_tensor(elements, " take ", *bits / 8, " bytes, its data_offsets span ", range_bytes);
    }
    return {};
  }

  const std::string& path_;
  const uint64_t data_begin_;
  const uint64_t data_bytes_;
  FileTensors part_;
  Place place_ = Place::outside;
  std::string name_;           // of the present tensor, or kMetadataKey
  std::string metadata_name_;  // of the present metadata entry
  bool metadata_seen_ = false;
  Tensor tensor_;  // being read
  Field field_ = Field::dtype;
  std::array<bool, 3> seen_{};  // fields of it, by Field
  std::vector<uint64_t> offsets_;
};

// Sorted by begin, the tensors must tile the data exactly.
Status check_tiling(const std::vector<Tensor>& tensors, uint64_t data_begin, uint64_t file_size_bytes,
                    const std::string& path) {
  uint64_t cursor = data_begin;
  const Tensor* last = nullptr;
  for (const uint32_t at : in_file_order(tensors)) {
    const Tensor* tensor = &tensors[at];
    if (tensor->offset < cursor) {
      return fail(Code::corrupt, path, ": tensors ", quoted(last->name), " and ", quoted(tensor->name),
                  " overlap at byte ", tensor->offset, " of the file");
    }
    if (tensor->offset > cursor) {
      return fail(Code::corrupt, path, ": the ", tensor->offset - cursor, " bytes at ", cursor,
                  " before tensor ", quoted(tensor->name), " belong to no tensor");
    }
    cursor = tensor->offset + tensor->size_bytes;
    last = tensor;
  }
  if (cursor == file_size_bytes) return {};
  return fail(Code::corrupt, path, ": ", file_size_bytes - cursor, " bytes are left over at ", cursor,
              ", behind the last tensor");
}

// weight_map of a model.safetensors.index.json; the rest is skipped.
class ShardIndexReader final : public JsonEvents {
 public:
  explicit ShardIndexReader(const std::string& path) : path_(path) {}

  Status object_begin() override {
    if (in_map_) return refuse_file("an object");
    ++depth_;
    if (depth_ != 2 || name_ != "weight_map") return {};
    if (map_seen_) return refuse("a duplicate weight_map");
    in_map_ = map_seen_ = true;
    return {};
  }
  Status key(std::string name) override {
    name_ = std::move(name);
    return {};
  }
  Status object_end() override {
    --depth_;
    in_map_ = false;
    return {};
  }
  Status array_begin() override {
    TRY(other("an array"));
    ++depth_;
    return {};
  }
  Status array_end() override {
    --depth_;
    return {};
  }
  Status string(std::string value) override {
    if (!in_map_) return other("a string");
    if (!stays_inside(value)) {
      return refuse("tensor ", quoted(name_), " in file ", quoted(value),
                    "; files must be named relative to the index and lie in its folder");
    }
    if (shards_.weight_map.size() == kEntryCountMax) return refuse("over ", kEntryCountMax, " tensors");
    const auto [entry, added] = shards_.weight_map.try_emplace(std::move(name_), std::move(value));
    if (!added) return refuse("tensor ", quoted(entry->first), " twice in its weight_map");
    return {};
  }
  Status natural(uint64_t) override { return other("a number"); }
  Status null() override { return other("null"); }
  Status other(std::string_view what) override {
    if (in_map_) return refuse_file(what);
    if (depth_ == 0) return fail(Code::corrupt, path_, " is ", what, ", not an object");
    if (depth_ == 1 && name_ == "weight_map") return refuse("a weight_map that is ", what, ", not an object");
    return {};
  }

  Result<ShardIndex> take() && {
    if (!map_seen_) return refuse("no weight_map");
    for (const auto& [tensor, file] : shards_.weight_map) shards_.files.push_back(file);
    std::sort(shards_.files.begin(), shards_.files.end());
    shards_.files.erase(std::unique(shards_.files.begin(), shards_.files.end()), shards_.files.end());
    return std::move(shards_);
  }

 private:
  tl::unexpected<base::Error> refuse(const auto&... what) const {
    return fail(Code::corrupt, path_, " has ", what...);
  }
  Status refuse_file(std::string_view what) const {
    return refuse("tensor ", quoted(name_), " in ", what, ", not in a file name");
  }

  static bool stays_inside(std::string_view file) {
    if (file.empty() || file.front() == '/' || file.find('\0') != std::string_view::npos) return false;
    for (size_t begin = 0; begin <= file.size();) {
      const size_t end = std::min(file.find('/', begin), file.size());
      if (file.substr(begin, end - begin) == "..") return false;
      begin = end + 1;
    }
    return true;
  }

  const std::string& path_;
  ShardIndex shards_;
  uint32_t depth_ = 0;  // of objects and arrays around the present place
  bool in_map_ = false;
  bool map_seen_ = false;
  std::string name_;  // of the present value
};

}  // namespace

Result<uint64_t> parse_header_length(std::span<const std::byte, kHeaderLengthBytes> first,
                                     uint64_t file_size_bytes, const std::string& path) {
  if (file_size_bytes < kHeaderLengthBytes) {
    return fail(Code::corrupt, path, ": its ", file_size_bytes, " bytes are too few for a safetensors file");
  }
  static_assert(std::endian::native == std::endian::little);
  uint64_t length = 0;
  std::memcpy(&length, first.data(), kHeaderLengthBytes);
  if (length == 0) return fail(Code::corrupt, path, ": header length is 0");
  if (length > kHeaderBytesMax) {
    return fail(Code::corrupt, path, ": header length ", length, " is over the format's limit of ",
                kHeaderBytesMax, "; is it a safetensors file?");
  }
  if (length > file_size_bytes - kHeaderLengthBytes) {
    return fail(Code::corrupt, path, ": header of ", length, " bytes ends past the file's ", file_size_bytes,
                " bytes; is it cut short?");
  }
  return length;
}

Result<FileTensors> parse_safetensors(std::string_view json, uint64_t file_size_bytes,
                                      const std::string& path) {
  if (file_size_bytes < kHeaderLengthBytes || json.size() > file_size_bytes - kHeaderLengthBytes) {
    return fail(Code::corrupt, path, ": header of ", json.size(), " bytes ends past the file's ",
                file_size_bytes, " bytes; is it cut short?");
  }
  const size_t brace = json.find_first_not_of(" \t\r\n");
  if (brace == std::string_view::npos || json[brace] != '{') {
    return fail(Code::corrupt, path, ": header does not begin with '{'; is it a safetensors file?");
  }
  const uint64_t data_begin = kHeaderLengthBytes + json.size();
  HeaderReader reader(path, data_begin, file_size_bytes - data_begin);
  TRY(walk_json(json, text(path, ": header"), reader));
  FileTensors part = std::move(reader).take();
  std::vector<Tensor>& tensors = part.tensors;
  std::sort(tensors.begin(), tensors.end(), [](const Tensor& a, const Tensor& b) { return a.name < b.name; });
  const auto twin = std::adjacent_find(tensors.begin(), tensors.end(),
                                       [](const Tensor& a, const Tensor& b) { return a.name == b.name; });
  if (twin != tensors.end()) {
    return fail(Code::corrupt, path, ": tensor ", quoted(twin->name), " is there twice");
  }
  TRY(check_tiling(tensors, data_begin, file_size_bytes, path));
  return part;
}

Result<ShardIndex> parse_shard_index(std::string_view json, const std::string& path) {
  if (json.size() > kHeaderBytesMax) {
    return fail(Code::corrupt, path, ": ", json.size(), " bytes are over the limit of ", kHeaderBytesMax);
  }
  ShardIndexReader reader(path);
  TRY(walk_json(json, path, reader));
  return std::move(reader).take();
}

Status check_shard_index(const ShardIndex& shards, const Index& index, Holds holds) {
  for (const auto& [name, file] : shards.weight_map) {
    const Tensor* tensor = index.find(name);
    if (tensor == nullptr && holds == Holds::some) continue;
    if (tensor == nullptr) {
      return fail(Code::corrupt, "the shard index puts tensor ", quoted(name), " in ", quoted(file),
                  ", but no file has it");
    }
    const std::string_view path = index.files[tensor->file].path;
    if (path != file && !path.ends_with("/" + file)) {
      return fail(Code::corrupt, "the shard index puts tensor ", quoted(name), " in ", quoted(file),
                  ", but it is in ", path);
    }
  }
  return {};
}

}  // namespace tensord::tensor
