#include "tensor/safetensors.h"

#include <gtest/gtest.h>

#include <array>
#include <cstring>

#include "base/bytes.h"
#include "base/text.h"

namespace tensord::tensor {

using base::Code;
using base::text;

namespace {

// What parse_safetensors says about a header with so many bytes of data behind it: an error's message, or
// "ok" and one "name dtype [shape] @offset+size" per tensor, offsets relative to the data.
std::string outcome(std::string_view json, uint64_t data_bytes) {
  const auto part = parse_safetensors(json, kHeaderLengthBytes + json.size() + data_bytes, "m");
  if (!part) {
    EXPECT_EQ(part.error().code, Code::corrupt);
    return part.error().message;
  }
  std::string out = "ok";
  for (const Tensor& tensor : part->tensors) {
    out += text(" ", tensor.name, " ", dtype_name(tensor.dtype), " [");
    for (const uint64_t extent : tensor.shape) out += text(extent, ",");
    out += text("] @", tensor.offset - kHeaderLengthBytes - json.size(), "+", tensor.size_bytes);
  }
  for (const auto& [key, value] : part->metadata) out += text(" ", key, "=", value);
  return out;
}

// {"w": fields}
std::string one(std::string_view fields) { return text("{\"w\":{", fields, "}}"); }

std::string u8(std::string_view name, uint64_t begin, uint64_t end) {
  return text("\"", name, "\":{\"dtype\":\"U8\",\"shape\":[", end - begin, "],\"data_offsets\":[", begin, ",", end,
              "]}");
}

std::string header_length(uint64_t length, uint64_t file_size_bytes) {
  std::array<std::byte, kHeaderLengthBytes> first;
  std::memcpy(first.data(), &length, sizeof length);
  const auto parsed = parse_header_length(first, file_size_bytes, "m");
  return parsed ? std::to_string(*parsed) : parsed.error().message;
}

std::string shard_outcome(std::string_view json) {
  const auto shards = parse_shard_index(json, "i.json");
  if (!shards) {
    EXPECT_EQ(shards.error().code, Code::corrupt);
    return shards.error().message;
  }
  std::string out = "ok";
  for (const std::string& file : shards->files) out += " " + file;
  for (const auto& [tensor, file] : shards->weight_map) out += text(" ", tensor, ":", file);
  return out;
}

}  // namespace

TEST(HeaderLength, is_accepted_up_to_the_end_of_the_file_and_the_format_s_limit) {
  EXPECT_EQ(header_length(2, 10), "2");
  EXPECT_EQ(header_length(100'000'000, 200'000'000), "100000000");
}

TEST(HeaderLength, bad_ones_are_refused_by_kind) {
  EXPECT_EQ(header_length(0, 0), "m: its 0 bytes are too few for a safetensors file");
  EXPECT_EQ(header_length(0, 7), "m: its 7 bytes are too few for a safetensors file");
  EXPECT_EQ(header_length(0, 8), "m: header length is 0");
  EXPECT_EQ(header_length(3, 10), "m: header of 3 bytes ends past the file's 10 bytes; is it cut short?");
  EXPECT_EQ(header_length(100'000'001, 200'000'000),
            "m: header length 100000001 is over the format's limit of 100000000; is it a safetensors file?");
  EXPECT_EQ(header_length(UINT64_MAX, 10),
            "m: header length 18446744073709551615 is over the format's limit of 100000000; is it a "
            "safetensors file?");
}

TEST(Safetensors, well_formed_headers_are_read) {
  EXPECT_EQ(outcome("{}", 0), "ok");
  EXPECT_EQ(outcome("{} \t\r\n ", 0), "ok");
  EXPECT_EQ(outcome(" \n{}", 0), "ok");
  EXPECT_EQ(outcome(R"({"__metadata__":null})", 0), "ok");
  EXPECT_EQ(outcome(R"({"__metadata__":{"format":"pt","a":""}})", 0), "ok a= format=pt");
  EXPECT_EQ(outcome(one(R"("dtype":"BF16","shape":[3,5],"data_offsets":[0,30])"), 30), "ok w BF16 [3,5,] @0+30");
  EXPECT_EQ(outcome(one(R"("data_offsets":[0,4],"shape":[],"dtype":"F32")"), 4), "ok w F32 [] @0+4");
  EXPECT_EQ(outcome(R"({"\u00e9\n":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1),
            "ok \xc3\xa9\n U8 [1,] @0+1");
}

TEST(Safetensors, tensors_are_sorted_by_name_whatever_their_order_in_the_file) {
  EXPECT_EQ(outcome(text("{", u8("b", 0, 3), ",", u8("a", 5, 6), ",", u8("c", 3, 5), "}"), 6),
            "ok a U8 [1,] @5+1 b U8 [3,] @0+3 c U8 [2,] @3+2");
}

TEST(Safetensors, empty_tensors_share_offsets_with_their_neighbours) {
  EXPECT_EQ(outcome(text("{", u8("a", 0, 4), ",", u8("e", 4, 4), ",", u8("f", 4, 4), ",", u8("b", 4, 5), ",",
                         u8("z", 0, 0), ",", u8("y", 5, 5), "}"),
                    5),
            "ok a U8 [4,] @0+4 b U8 [1,] @4+1 e U8 [0,] @4+0 f U8 [0,] @4+0 y U8 [0,] @5+0 z U8 [0,] @0+0");
  EXPECT_EQ(outcome(one(R"("dtype":"F64","shape":[16,0,3],"data_offsets":[0,0])"), 0), "ok w F64 [16,0,3,] @0+0");
  EXPECT_EQ(outcome(text("{", u8("a", 0, 4), ",", u8("e", 2, 2), "}"), 4),
            text("m: tensors 'a' and 'e' overlap at byte ",
                 8 + text("{", u8("a", 0, 4), ",", u8("e", 2, 2), "}").size() + 2, " of the file"));
}

TEST(Safetensors, elements_smaller_than_a_byte_must_fill_whole_bytes) {
  EXPECT_EQ(outcome(one(R"("dtype":"F4","shape":[3,2],"data_offsets":[0,3])"), 3), "ok w F4 [3,2,] @0+3");
  EXPECT_EQ(outcome(one(R"("dtype":"F6_E3M2","shape":[4],"data_offsets":[0,3])"), 3), "ok w F6_E3M2 [4,] @0+3");
  EXPECT_EQ(outcome(one(R"("dtype":"F4","shape":[3],"data_offsets":[0,2])"), 2),
            "m: tensor 'w': 3 elements of F4 are not a whole number of bytes");
}

TEST(Safetensors, unknown_dtypes_are_opaque_and_of_any_length) {
  EXPECT_EQ(outcome(one(R"("dtype":"NVFP4","shape":[5],"data_offsets":[0,3])"), 3), "ok w ? [5,] @0+3");
  EXPECT_EQ(parse_safetensors(one(R"("dtype":"NVFP4","shape":[5],"data_offsets":[0,0])"), 100, "m").has_value(), false);
  const std::string json = one(R"("dtype":"NVFP4","shape":[5],"data_offsets":[0,3])");
  EXPECT_EQ(parse_safetensors(json, 8 + json.size() + 3, "m")->tensors[0].dtype_text, "NVFP4");
}

TEST(Safetensors, text_that_is_no_json_object_is_refused) {
  constexpr const char* kNoBrace = "m: header does not begin with '{'; is it a safetensors file?";
  EXPECT_EQ(outcome("", 4), kNoBrace);
  EXPECT_EQ(outcome("   ", 0), kNoBrace);
  EXPECT_EQ(outcome("[]", 0), kNoBrace);
  EXPECT_EQ(outcome("\xef\xbb\xbf{}", 0), kNoBrace);
  EXPECT_EQ(outcome("PK\x03\x04", 0), kNoBrace);
  EXPECT_EQ(outcome("{", 0), "m: header is not valid JSON at byte 2");
  EXPECT_EQ(outcome("{}x", 0), "m: header is not valid JSON at byte 3");
  EXPECT_EQ(outcome("{} {}", 0), "m: header is not valid JSON at byte 4");
  EXPECT_EQ(outcome(std::string_view("{}\0{", 4), 0), "m: header is not valid JSON at byte 3");
  EXPECT_EQ(outcome("{/**/}", 0), "m: header is not valid JSON at byte 2");
  EXPECT_EQ(outcome("{\"a\nb\":1}", 0), "m: header is not valid JSON at byte 4");
  EXPECT_EQ(outcome("{\"\xff\":1}", 0), "m: header is not UTF-8 at byte 3");
  EXPECT_EQ(outcome("{\"\xc0\x80\":1}", 0), "m: header is not UTF-8 at byte 3");
  EXPECT_EQ(outcome(R"({"\ud800":1})", 0), "m: header is not valid JSON at byte 9");
}

TEST(Safetensors, a_header_longer_than_its_file_is_refused) {
  EXPECT_EQ(parse_safetensors("{}", 9, "m").error().message,
            "m: header of 2 bytes ends past the file's 9 bytes; is it cut short?");
  EXPECT_FALSE(parse_safetensors("{}", 0, "m"));
}

TEST(Safetensors, values_of_the_wrong_kind_are_refused_by_name) {
  EXPECT_EQ(outcome(R"({"w":1})", 0), "m: tensor 'w': is a number, not an object");
  EXPECT_EQ(outcome(R"({"w":[]})", 0), "m: tensor 'w': is an array, not an object");
  EXPECT_EQ(outcome(R"({"w":null})", 0), "m: tensor 'w': is null, not an object");
  EXPECT_EQ(outcome(one(R"("dtype":3)"), 0), "m: tensor 'w': dtype is a number, not a string");
  EXPECT_EQ(outcome(one(R"("dtype":["F32"])"), 0), "m: tensor 'w': dtype is an array, not a string");
  EXPECT_EQ(outcome(one(R"("shape":4)"), 0), "m: tensor 'w': shape is a number, not an array of sizes");
  EXPECT_EQ(outcome(one(R"("shape":{})"), 0), "m: tensor 'w': shape is an object, not an array of sizes");
  EXPECT_EQ(outcome(one(R"("shape":[-1])"), 0), "m: tensor 'w': shape holds a negative number, not a natural number");
  EXPECT_EQ(outcome(one(R"("shape":[-0])"), 0), "m: tensor 'w': shape holds a negative number, not a natural number");
  EXPECT_EQ(outcome(one(R"("shape":[1.0])"), 0), "m: tensor 'w': shape holds a fraction, not a natural number");
  EXPECT_EQ(outcome(one(R"("shape":[1e3])"), 0), "m: tensor 'w': shape holds a fraction, not a natural number");
  EXPECT_EQ(outcome(one(R"("shape":[18446744073709551616])"), 0),
            "m: tensor 'w': shape holds a number beyond 64 bits, not a natural number");
  EXPECT_EQ(outcome(one(R"("shape":[[1]])"), 0), "m: tensor 'w': shape holds an array, not a natural number");
  EXPECT_EQ(outcome(one(R"("shape":[true])"), 0), "m: tensor 'w': shape holds true, not a natural number");
  EXPECT_EQ(outcome(one(R"("data_offsets":["0",4])"), 4),
            "m: tensor 'w': data_offsets holds a string, not a natural number");
  EXPECT_EQ(outcome(one(R"("data_offsets":null)"), 4),
            "m: tensor 'w': data_offsets is null, not an array of 2 numbers");
  EXPECT_EQ(outcome(R"({"__metadata__":[]})", 0), "m: header has a __metadata__ that is an array, not an object");
  EXPECT_EQ(outcome(R"({"__metadata__":{"k":1}})", 0),
            "m: header has a __metadata__ whose 'k' is a number, not a string");
  EXPECT_EQ(outcome(R"({"__metadata__":{"k":{}}})", 0),
            "m: header has a __metadata__ whose 'k' is an object, not a string");
}

TEST(Safetensors, a_number_too_large_for_a_double_is_no_valid_json) {
  EXPECT_EQ(outcome(one(R"("shape":[1e999])"), 0), "m: header is not valid JSON at byte 20");
}

TEST(Safetensors, missing_unknown_and_surplus_fields_are_refused) {
  EXPECT_EQ(outcome(one(""), 0), "m: tensor 'w': dtype is missing");
  EXPECT_EQ(outcome(one(R"("dtype":"U8","data_offsets":[0,4])"), 4), "m: tensor 'w': shape is missing");
  EXPECT_EQ(outcome(one(R"("dtype":"U8","shape":[4])"), 4), "m: tensor 'w': data_offsets is missing");
  EXPECT_EQ(outcome(one(R"("dtype":"U8","shape":[4],"strides":[1])"), 4), "m: tensor 'w': unknown field 'strides'");
  EXPECT_EQ(outcome(one(R"("dtype":"U8","shape":[4],"data_offsets":[0])"), 4),
            "m: tensor 'w': data_offsets has 1 of 2 numbers");
  EXPECT_EQ(outcome(one(R"("dtype":"U8","shape":[4],"data_offsets":[0,4,8])"), 4),
            "m: tensor 'w': data_offsets has more than 2 numbers");
}

TEST(Safetensors, duplicates_are_refused_at_every_level) {
  EXPECT_EQ(outcome(text("{", u8("a", 0, 4), ",", u8("b", 4, 5), ",", u8("a", 0, 4), "}"), 5),
            "m: tensor 'a' is there twice");
  EXPECT_EQ(outcome(one(R"("dtype":"U8","dtype":"U8")"), 0), "m: tensor 'w': duplicate field 'dtype'");
  EXPECT_EQ(outcome(R"({"__metadata__":{"k":"1","k":"2"}})", 0), "m: header has a duplicate metadata key 'k'");
  EXPECT_EQ(outcome(R"({"__metadata__":{},"__metadata__":{}})", 0), "m: header has a duplicate __metadata__");
  EXPECT_EQ(outcome(R"({"__metadata__":{},"__metadata__":null})", 0), "m: header has a duplicate __metadata__");
}

TEST(Safetensors, ranges_that_do_not_fit_file_or_shape_are_refused) {
  EXPECT_EQ(outcome(one(R"("dtype":"U8","shape":[4],"data_offsets":[4,0])"), 4),
            "m: tensor 'w': data_offsets [4, 0] end before they begin");
  EXPECT_EQ(outcome(one(R"("dtype":"I32","shape":[2,2],"data_offsets":[0,16])"), 14),
            "m: tensor 'w': data_offsets [0, 16] end past the file's 14 bytes of data; is it cut short?");
  EXPECT_EQ(outcome(one(R"("dtype":"U8","shape":[8],"data_offsets":[18446744073709551608,18446744073709551615])"), 8),
            "m: tensor 'w': data_offsets [18446744073709551608, 18446744073709551615] end past the file's 8 bytes "
            "of "
            "data; is it cut short?");
  EXPECT_EQ(outcome(one(R"("dtype":"I32","shape":[2,2],"data_offsets":[0,4])"), 4),
            "m: tensor 'w': 4 elements of I32 take 16 bytes, its data_offsets span 4");
  EXPECT_EQ(outcome(one(R"("dtype":"F32","shape":[],"data_offsets":[0,0])"), 0),
            "m: tensor 'w': 1 elements of F32 take 4 bytes, its data_offsets span 0");
}

TEST(Safetensors, products_that_overflow_are_refused) {
  EXPECT_EQ(outcome(one(R"("dtype":"I32","shape":[2,18446744073709551614],"data_offsets":[0,16])"), 16),
            "m: tensor 'w': the product of its shape does not fit 64 bits");
  EXPECT_EQ(outcome(one(R"("dtype":"X","shape":[4294967296,4294967296],"data_offsets":[0,16])"), 16),
            "m: tensor 'w': the product of its shape does not fit 64 bits");
  EXPECT_EQ(outcome(one(R"("dtype":"U8","shape":[2305843009213693952],"data_offsets":[0,16])"), 16),
            "m: tensor 'w': its size in bits does not fit 64 bits");
}

TEST(Safetensors, ranks_up_to_64_are_read) {
  const auto header = [](size_t rank) {
    std::string shape = "1";
    for (size_t i = 1; i < rank; ++i) shape += ",1";
    return one(text("\"dtype\":\"U8\",\"shape\":[", shape, "],\"data_offsets\":[0,1]"));
  };
  EXPECT_EQ(outcome(header(64), 1).substr(0, 2), "ok");
  EXPECT_EQ(outcome(header(65), 1), "m: tensor 'w': over 64 dimensions");
}

TEST(Safetensors, holes_overlaps_and_left_over_bytes_are_told_apart) {
  const std::string hole = text("{", u8("a", 0, 4), ",", u8("b", 6, 8), "}");
  EXPECT_EQ(outcome(hole, 8),
            text("m: the 2 bytes at ", 8 + hole.size() + 4, " before tensor 'b' belong to no tensor"));
  const std::string late = text("{", u8("a", 1, 4), "}");
  EXPECT_EQ(outcome(late, 4), text("m: the 1 bytes at ", 8 + late.size(), " before tensor 'a' belong to no tensor"));
  const std::string overlap = text("{", u8("b", 3, 8), ",", u8("a", 0, 4), "}");
  EXPECT_EQ(outcome(overlap, 8),
            text("m: tensors 'a' and 'b' overlap at byte ", 8 + overlap.size() + 3, " of the file"));
  const std::string shared = text("{", u8("a", 0, 4), ",", u8("b", 0, 4), "}");
  EXPECT_EQ(outcome(shared, 4), text("m: tensors 'a' and 'b' overlap at byte ", 8 + shared.size(), " of the file"));
  const std::string rest = text("{", u8("a", 0, 4), "}");
  EXPECT_EQ(outcome(rest, 9), text("m: 5 bytes are left over at ", 8 + rest.size() + 4, ", behind the last tensor"));
  EXPECT_EQ(outcome("{}", 1), "m: 1 bytes are left over at 10, behind the last tensor");
}

TEST(Safetensors, hostile_names_are_escaped_and_cut_in_messages) {
  EXPECT_EQ(outcome(R"({"a\u001b[31m'":1})", 0), "m: tensor 'a\\x1b[31m\\'': is a number, not an object");
  EXPECT_LT(outcome(text("{\"", std::string(100'000, 'x'), "\":1}"), 0).size(), 300u);
  EXPECT_LT(outcome(text("{\"a\":", std::string(100'000, 'x'), "}"), 0).size(), 300u);
}

TEST(Safetensors, deep_nesting_is_refused_at_once) {
  EXPECT_EQ(outcome(text("{\"w\":", std::string(1'000'000, '[')), 0), "m: tensor 'w': is an array, not an object");
  EXPECT_EQ(shard_outcome(text("{\"w\":", std::string(1'000'000, '['))), "i.json nests deeper than 32 levels");
}

TEST(Safetensors, shards_1_2_and_100_join_into_one_index) {
  for (const size_t shard_count : {1, 2, 100}) {
    std::vector<IndexFile> files;
    std::vector<FileTensors> parts;
    for (size_t i = 0; i < shard_count; ++i) {
      // The last tensor of each shard spans exactly to its end.
      const std::string json = text("{", u8(text("t", i, ".a"), 0, 3), ",", u8(text("t", i, ".b"), 3, 10 + i), "}");
      files.push_back({text("model-", i), kHeaderLengthBytes + json.size() + 10 + i});
      parts.push_back(parse_safetensors(json, files.back().size_bytes, files.back().path).value());
    }
    const Index index = join_files(files, parts).value();
    ASSERT_EQ(index.tensors.size(), 2 * shard_count);
    for (size_t i = 0; i < shard_count; ++i) {
      const Tensor* tensor = index.find(text("t", i, ".b"));
      ASSERT_NE(tensor, nullptr);
      EXPECT_EQ(tensor->file, i);
      EXPECT_EQ(tensor->offset + tensor->size_bytes, files[i].size_bytes);
    }
  }
}

TEST(Safetensors, a_hundred_thousand_tensors_are_read) {
  std::string json = "{";
  for (uint64_t i = 0; i < 100'000; ++i) {
    json += text(i == 0 ? "" : ",", u8(text("model.layers.", i * 7919 % 100'000, ".mlp.weight"), i * 8, i * 8 + 8));
  }
  json += "}";
  const auto part = parse_safetensors(json, kHeaderLengthBytes + json.size() + 800'000, "m");
  ASSERT_TRUE(part) << part.error().message;
  EXPECT_EQ(part->tensors.size(), 100'000u);
}

TEST(Safetensors, too_many_entries_are_refused) {
  std::string json = R"({"__metadata__":{"0":"")";
  for (uint64_t i = 1; i <= kEntryCountMax; ++i) json += text(",\"", i, "\":\"\"");
  EXPECT_EQ(outcome(json + "}}", 0), "m: header has over 1000000 metadata entries");
}

TEST(ShardIndex, files_are_distinct_and_sorted_and_all_else_is_ignored) {
  EXPECT_EQ(shard_outcome(R"({"metadata":{"total_size":1.5,"x":[{"weight_map":3}]},
      "weight_map":{"b":"z/m-2","a":"m-10","c":"m-10"},"y":null})"),
            "ok m-10 z/m-2 a:m-10 b:z/m-2 c:m-10");
  EXPECT_EQ(shard_outcome(R"({"weight_map":{}})"), "ok");
  EXPECT_EQ(shard_outcome(R"({"metadata":{"weight_map":{"a":1}},"weight_map":{"a":"..m"}})"), "ok ..m a:..m");
}

TEST(ShardIndex, bad_structure_is_refused) {
  EXPECT_EQ(shard_outcome(""), "i.json is not valid JSON at byte 1");
  EXPECT_EQ(shard_outcome("[]"), "i.json is an array, not an object");
  EXPECT_EQ(shard_outcome("7"), "i.json is a number, not an object");
  EXPECT_EQ(shard_outcome("{}"), "i.json has no weight_map");
  EXPECT_EQ(shard_outcome(R"({"weight_map":["m"]})"), "i.json has a weight_map that is an array, not an object");
  EXPECT_EQ(shard_outcome(R"({"weight_map":"m"})"), "i.json has a weight_map that is a string, not an object");
  EXPECT_EQ(shard_outcome(R"({"weight_map":{"a":1}})"), "i.json has tensor 'a' in a number, not in a file name");
  EXPECT_EQ(shard_outcome(R"({"weight_map":{"a":{}}})"), "i.json has tensor 'a' in an object, not in a file name");
  EXPECT_EQ(shard_outcome(R"({"weight_map":{"a":["m"]}})"), "i.json has tensor 'a' in an array, not in a file name");
  EXPECT_EQ(shard_outcome(R"({"weight_map":{},"weight_map":{}})"), "i.json has a duplicate weight_map");
  EXPECT_EQ(shard_outcome(R"({"weight_map":{"a":"m","a":"m"}})"), "i.json has tensor 'a' twice in its weight_map");
  EXPECT_EQ(shard_outcome("{\"weight_map\":{\"a\":\"\xff\"}}"), "i.json is not UTF-8 at byte 21");
}

TEST(ShardIndex, files_outside_of_its_folder_are_refused) {
  for (const char* file : {"", "/etc/passwd", "..", "../m", "a/..", "a/../../m", "a/../m", "m\\u0000.safetensors"}) {
    const std::string message = shard_outcome(text(R"({"weight_map":{"a":")", file, "\"}}"));
    EXPECT_NE(message.find("files must be named relative to the index and lie in its folder"), std::string::npos)
        << message;
  }
  EXPECT_EQ(shard_outcome(R"({"weight_map":{"a":"../m"}})"),
            "i.json has tensor 'a' in file '../m'; files must be named relative to the index and lie in its "
            "folder");
}

TEST(ShardIndex, tensors_must_be_in_the_file_it_names) {
  const std::string json = text("{", u8("a", 0, 1), ",", u8("b", 1, 2), "}");
  const uint64_t size_bytes = kHeaderLengthBytes + json.size() + 2;
  const Index index =
      join_files({{"/models/x/m-1", size_bytes}}, {parse_safetensors(json, size_bytes, "m").value()}).value();
  const auto check = [&](std::string tensor, std::string file) {
    const Status status = check_shard_index({.files = {file}, .weight_map = {{tensor, file}}}, index);
    return status ? "ok" : status.error().message;
  };
  EXPECT_EQ(check("a", "m-1"), "ok");
  EXPECT_EQ(check("b", "x/m-1"), "ok");
  EXPECT_EQ(check("b", "/models/x/m-1"), "ok");
  EXPECT_EQ(check("a", "-1"), "the shard index puts tensor 'a' in '-1', but it is in /models/x/m-1");
  EXPECT_EQ(check("c", "m-1"), "the shard index puts tensor 'c' in 'm-1', but no file has it");
}

}  // namespace tensord::tensor
