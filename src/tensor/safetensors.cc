#include "tensor/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/bytes.h"
#include "base/text.h"

namespace tensord::tensor {

using base::checked_multiply;
using base::Code;
using base::fail;
using base::text;

namespace {

// ---- JSON as a stream of events: no document tree is built ----------------------------------------------------------

// Objects and arrays deeper than this are refused.
constexpr uint32_t kJsonDepthMax = 32;

// A value as it begins: scalars whole, objects and arrays before what they hold.
struct JsonValue {
  enum class Kind : uint8_t { object, array, string, natural, null, other };
  Kind kind = Kind::other;
  std::string_view what;  // "an object", "a string", "a number", .. "a negative number", "a fraction", "true", "false"
  std::string text = {};  // of a string
  uint64_t number = 0;    // of a natural number: 0 .. 2^64 - 1, written without sign, point or exponent
};

using Kind = JsonValue::Kind;

// One JSON value (RFC 8259), white space around it allowed, read as events for the class that knows its format. Refused
// with Code::corrupt, beginning with `where`: what is not JSON or not UTF-8 (with the byte where it stops being so), or
// nested deeper than kJsonDepthMax.
class JsonReader {
 public:
  explicit JsonReader(std::string where) : where_(std::move(where)) {}
  virtual ~JsonReader() = default;

  Status read(std::string_view json) {
    // The library takes a NUL for the end of its input.
    if (const size_t nul = json.find('\0'); nul != std::string_view::npos) {
      return fail(Code::corrupt, where_, " is not valid JSON at byte ", nul + 1);
    }
    try {
      nlohmann::json::sax_parse(json.begin(), json.end(), this);
    } catch (const std::exception& error) {
      return fail(Code::exhausted, where_, " could not be read: ", error.what());
    }
    return status_;
  }

  // The library's interface. Every function says whether to go on.
  bool null() { return keep(value({Kind::null, "null"})); }
  bool boolean(bool given) { return keep(value({Kind::other, given ? "true" : "false"})); }
  bool number_integer(int64_t) { return keep(value({Kind::other, "a negative number"})); }
  bool number_unsigned(uint64_t given) { return keep(value({Kind::natural, "a number", {}, given})); }
  bool number_float(double, const std::string& digits) {
    const bool whole = digits.find_first_of(".eE") == std::string::npos;
    return keep(value({Kind::other, whole ? "a number beyond 64 bits" : "a fraction"}));
  }
  bool string(std::string& given) { return keep(value({Kind::string, "a string", std::move(given)})); }
  bool binary(nlohmann::json::binary_t&) { return false; }  // CBOR and its like only
  bool start_object(size_t) { return enter({Kind::object, "an object"}); }
  bool key(std::string& name) { return keys_.back() = std::move(name), true; }
  bool end_object() { return keys_.pop_back(), keep(end()); }
  bool start_array(size_t) { return enter({Kind::array, "an array"}); }
  bool end_array() { return end_object(); }
  bool parse_error(size_t byte, const std::string&, const nlohmann::json::exception& error) {
    // The library's own text quotes the input without bounds, so only its kind is used.
    const bool encoding = std::string_view(error.what()).find("ill-formed UTF-8") != std::string_view::npos;
    return keep(fail(Code::corrupt, where_, encoding ? " is not UTF-8" : " is not valid JSON", " at byte ", byte));
  }

 protected:
  virtual Status value(JsonValue&& value) = 0;
  virtual Status end() { return {}; }  // of an object or array

  tl::unexpected<base::Error> refuse(const auto&... what) const {
    return fail(Code::corrupt, where_, " has ", what...);
  }

  const std::string where_;
  std::vector<std::string> keys_;  // around the value, of which any may be there twice; "" for an array

 private:
  bool keep(Status status) {
    status_ = std::move(status);
    return status_.has_value();
  }
  bool enter(JsonValue&& opened) {
    if (keys_.size() == kJsonDepthMax) {
      return keep(fail(Code::corrupt, where_, " nests deeper than ", kJsonDepthMax, " levels"));
    }
    if (!keep(value(std::move(opened)))) return false;
    keys_.emplace_back();
    return true;
  }

  Status status_;
};

// ---- the header -----------------------------------------------------------------------------------------------------

constexpr std::string_view kMetadataKey = "__metadata__";

// The header's JSON becomes tensors, one after another; each is checked by itself as soon as its object ends.
//
//   { "w": { "dtype": .., "shape": [..], "data_offsets": [begin, end] }, "__metadata__": { "key": "value" } }
class HeaderReader final : public JsonReader {
 public:
  HeaderReader(const std::string& path, uint64_t data_begin, uint64_t data_bytes)
      : JsonReader(path + ": header"), path_(path), data_begin_(data_begin), data_bytes_(data_bytes) {}

  FileTensors take() && { return std::move(part_); }

 private:
  Status value(JsonValue&& value) override {
    if (keys_.empty()) return {};
    const bool in_metadata = keys_[0] == kMetadataKey;
    switch (keys_.size()) {
      case 1:
        return in_metadata ? begin_metadata(value) : begin_tensor(keys_[0], value);
      case 2:
        return in_metadata ? add_metadata(keys_[1], value) : set_field(keys_[1], value);
      default:
        return add_number(keys_[1], value);
    }
  }
  Status end() override { return keys_.size() == 1 && keys_[0] != kMetadataKey ? end_tensor() : Status(); }

  struct Field {
    std::string_view name;
    Kind kind;
    std::string_view type;
  };
  static constexpr std::array<Field, 3> kFields{{{"dtype", Kind::string, "a string"},
                                                 {"shape", Kind::array, "an array of sizes"},
                                                 {"data_offsets", Kind::array, "an array of 2 numbers"}}};

  Status refuse_tensor(const auto&... what) const {
    return fail(Code::corrupt, path_, ": tensor ", base::quoted(tensor_.name), ": ", what...);
  }

  Status begin_metadata(const JsonValue& value) {
    if (value.kind != Kind::object && value.kind != Kind::null) {
      return refuse("a __metadata__ that is ", value.what, ", not an object");
    }
    if (std::exchange(metadata_seen_, true)) return refuse("a duplicate __metadata__");
    return {};
  }

  Status add_metadata(const std::string& key, JsonValue& value) {
    if (value.kind != Kind::string) {
      return refuse("a __metadata__ whose ", base::quoted(key), " is ", value.what, ", not a string");
    }
    if (part_.metadata.size() == kEntryCountMax) return refuse("over ", kEntryCountMax, " metadata entries");
    if (part_.metadata.emplace(key, std::move(value.text)).second) return {};
    return refuse("a duplicate metadata key ", base::quoted(key));
  }

  Status begin_tensor(const std::string& name, const JsonValue& value) {
    tensor_ = Tensor{.name = name};
    seen_ = {};
    offsets_.clear();
    if (value.kind != Kind::object) return refuse_tensor("is ", value.what, ", not an object");
    if (part_.tensors.size() == kEntryCountMax) return refuse("over ", kEntryCountMax, " tensors");
    return {};
  }

  Status set_field(std::string_view name, JsonValue& value) {
    const auto field = std::find_if(kFields.begin(), kFields.end(), [&](const Field& one) { return one.name == name; });
    if (field == kFields.end()) return refuse_tensor("unknown field ", base::quoted(name));
    bool& seen = seen_[static_cast<size_t>(field - kFields.begin())];
    if (std::exchange(seen, true)) return refuse_tensor("duplicate field ", base::quoted(name));
    if (value.kind != field->kind) return refuse_tensor(name, " is ", value.what, ", not ", field->type);
    if (value.kind == Kind::string) {
      tensor_.dtype = parse_dtype(value.text);
      tensor_.dtype_text = std::move(value.text);
    }
    return {};
  }

  Status add_number(std::string_view field, const JsonValue& value) {
    if (value.kind != Kind::natural) {
      return refuse_tensor(field, " holds ", value.what, ", not a natural number");
    }
    const bool is_shape = field == "shape";
    if (is_shape && tensor_.shape.size() == kRankMax) return refuse_tensor("over ", kRankMax, " dimensions");
    if (!is_shape && offsets_.size() == 2) return refuse_tensor("data_offsets has more than 2 numbers");
    (is_shape ? tensor_.shape : offsets_).push_back(value.number);
    return {};
  }

  Status end_tensor() {
    for (size_t i = 0; i < kFields.size(); ++i) {
      if (!seen_[i]) return refuse_tensor(kFields[i].name, " is missing");
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
    tensor_.offset = data_begin_ + begin;
    tensor_.size_bytes = end - begin;
    part_.tensors.push_back(std::move(tensor_));
    return {};
  }

  Status check_shape(uint64_t range_bytes) const {
    const std::optional<uint64_t> product = element_count(tensor_.shape);
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
  bool metadata_seen_ = false;
  Tensor tensor_;               // being read
  std::array<bool, 3> seen_{};  // fields of it, as in kFields
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
      return fail(Code::corrupt, path, ": tensors ", base::quoted(last->name), " and ", base::quoted(tensor->name),
                  " overlap at byte ", tensor->offset, " of the file");
    }
    if (tensor->offset > cursor) {
      return fail(Code::corrupt, path, ": the ", tensor->offset - cursor, " bytes at ", cursor, " before tensor ",
                  base::quoted(tensor->name), " belong to no tensor");
    }
    cursor = tensor->offset + tensor->size_bytes;
    last = tensor;
  }
  if (cursor == file_size_bytes) return {};
  return fail(Code::corrupt, path, ": ", file_size_bytes - cursor, " bytes are left over at ", cursor,
              ", behind the last tensor");
}

// weight_map of a model.safetensors.index.json; the rest is skipped.
class ShardIndexReader final : public JsonReader {
 public:
  using JsonReader::JsonReader;

  Result<ShardIndex> take() && {
    if (!map_seen_) return refuse("no weight_map");
    for (const auto& [tensor, file] : shards_.weight_map) shards_.files.insert(file);
    return std::move(shards_);
  }

 private:
  Status value(JsonValue&& value) override {
    const bool is_object = value.kind == Kind::object;
    if (keys_.empty() && !is_object) return fail(Code::corrupt, where_, " is ", value.what, ", not an object");
    if (keys_.empty() || keys_[0] != "weight_map") return {};
    if (keys_.size() > 1) return add(keys_[1], value);
    if (!is_object) return refuse("a weight_map that is ", value.what, ", not an object");
    if (std::exchange(map_seen_, true)) return refuse("a duplicate weight_map");
    return {};
  }

  Status add(const std::string& tensor, JsonValue& value) {
    if (value.kind != Kind::string) {
      return refuse("tensor ", base::quoted(tensor), " in ", value.what, ", not in a file name");
    }
    if (!stays_inside(value.text)) {
      return refuse("tensor ", base::quoted(tensor), " in file ", base::quoted(value.text),
                    "; files must be named relative to the index and lie in its folder");
    }
    if (shards_.weight_map.size() == kEntryCountMax) return refuse("over ", kEntryCountMax, " tensors");
    if (shards_.weight_map.try_emplace(tensor, std::move(value.text)).second) return {};
    return refuse("tensor ", base::quoted(tensor), " twice in its weight_map");
  }

  static bool stays_inside(std::string_view file) {
    return !file.empty() && file[0] != '/' && file.find('\0') == std::string_view::npos &&
           base::text("/", file, "/").find("/../") == std::string::npos;
  }

  ShardIndex shards_;
  bool map_seen_ = false;
};

}  // namespace

Result<uint64_t> parse_header_length(std::span<const std::byte, kHeaderLengthBytes> first, uint64_t file_size_bytes,
                                     const std::string& path) {
  if (file_size_bytes < kHeaderLengthBytes) {
    return fail(Code::corrupt, path, ": its ", file_size_bytes, " bytes are too few for a safetensors file");
  }
  static_assert(std::endian::native == std::endian::little);
  uint64_t length = 0;
  std::memcpy(&length, first.data(), kHeaderLengthBytes);
  if (length == 0) return fail(Code::corrupt, path, ": header length is 0");
  if (length > kHeaderBytesMax) {
    return fail(Code::corrupt, path, ": header length ", length, " is over the format's limit of ", kHeaderBytesMax,
                "; is it a safetensors file?");
  }
  if (length > file_size_bytes - kHeaderLengthBytes) {
    return fail(Code::corrupt, path, ": header of ", length, " bytes ends past the file's ", file_size_bytes,
                " bytes; is it cut short?");
  }
  return length;
}

Result<FileTensors> parse_safetensors(std::string_view json, uint64_t file_size_bytes, const std::string& path) {
  if (file_size_bytes < kHeaderLengthBytes || json.size() > file_size_bytes - kHeaderLengthBytes) {
    return fail(Code::corrupt, path, ": header of ", json.size(), " bytes ends past the file's ", file_size_bytes,
                " bytes; is it cut short?");
  }
  const size_t brace = json.find_first_not_of(" \t\r\n");
  if (brace == std::string_view::npos || json[brace] != '{') {
    return fail(Code::corrupt, path, ": header does not begin with '{'; is it a safetensors file?");
  }
  const uint64_t data_begin = kHeaderLengthBytes + json.size();
  HeaderReader reader(path, data_begin, file_size_bytes - data_begin);
  TRY(reader.read(json));
  FileTensors part = std::move(reader).take();
  if (const Tensor* twin = sort_by_name(part.tensors)) {
    return fail(Code::corrupt, path, ": tensor ", base::quoted(twin->name), " is there twice");
  }
  TRY(check_tiling(part.tensors, data_begin, file_size_bytes, path));
  return part;
}

Result<ShardIndex> parse_shard_index(std::string_view json, const std::string& path) {
  if (json.size() > kHeaderBytesMax) {
    return fail(Code::corrupt, path, ": ", json.size(), " bytes are over the limit of ", kHeaderBytesMax);
  }
  ShardIndexReader reader(path);
  TRY(reader.read(json));
  return std::move(reader).take();
}

Status check_shard_index(const ShardIndex& shards, const Index& index, Holds holds) {
  for (const auto& [name, file] : shards.weight_map) {
    const Tensor* tensor = index.find(name);
    if (tensor == nullptr && holds == Holds::some) continue;
    if (tensor == nullptr) {
      return fail(Code::corrupt, "the shard index puts tensor ", base::quoted(name), " in ", base::quoted(file),
                  ", but no file has it");
    }
    const std::string_view path = index.files[tensor->file].path;
    if (path != file && !path.ends_with("/" + file)) {
      return fail(Code::corrupt, "the shard index puts tensor ", base::quoted(name), " in ", base::quoted(file),
                  ", but it is in ", path);
    }
  }
  return {};
}

}  // namespace tensord::tensor
