#include "tensor/index.h"

#include <gtest/gtest.h>

#include "tensor/dtype.h"

namespace tensord::tensor {

namespace {

Tensor byte_tensor(std::string name, uint64_t offset, uint64_t size_bytes) {
  return Tensor{.name = std::move(name),
                .dtype = Dtype::u8,
                .dtype_text = "U8",
                .shape = {size_bytes},
                .offset = offset,
                .size_bytes = size_bytes};
}

}  // namespace

TEST(Dtype, every_name_of_the_format_is_read_back_with_its_size) {
  const std::pair<std::string_view, uint32_t> rows[] = {
      {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},   {"I8", 8},
      {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"I16", 16}, {"F8_E5M2FNUZ", 8},
      {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32}, {"F32", 32},
      {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64},
  };
  EXPECT_EQ(std::size(rows), size_t{kDtypeCount - 1});
  for (const auto& [name, bits] : rows) {
    const Dtype dtype = parse_dtype(name);
    EXPECT_NE(dtype, Dtype::opaque) << name;
    EXPECT_EQ(dtype_name(dtype), name);
    EXPECT_EQ(dtype_bits(dtype), bits) << name;
    EXPECT_EQ(dtype_bytes(dtype).has_value(), bits >= 8) << name;
  }
}

TEST(Dtype, unknown_names_and_numbers_are_opaque) {
  for (const char* name : {"", "?", "f32", "F32 ", "NVFP4"}) EXPECT_EQ(parse_dtype(name), Dtype::opaque) << name;
  EXPECT_EQ(dtype_name(static_cast<Dtype>(200)), "?");
  EXPECT_EQ(dtype_bytes(Dtype::opaque), std::nullopt);
}

TEST(Dtype, numbers_are_those_of_the_protocol) {
  EXPECT_EQ(static_cast<int>(parse_dtype("BF16")), 15);
  EXPECT_EQ(static_cast<int>(parse_dtype("U64")), 22);
}

TEST(Index, joined_files_are_sorted_by_name_and_remember_their_file) {
  std::vector<FileTensors> parts(3);
  parts[0].tensors = {byte_tensor("b", 10, 4), byte_tensor("d", 14, 1)};
  parts[1].tensors = {byte_tensor("a", 10, 2)};
  parts[1].metadata = {{"format", "pt"}};
  parts[2].tensors = {byte_tensor("c", 20, 8)};
  parts[2].metadata = {{"format", "np"}};
  const Index index = join_files({{"x", 15}, {"y", 12}, {"z", 28}}, parts).value();
  std::string order;
  for (const Tensor& tensor : index.tensors) order += tensor.name + std::to_string(tensor.file) + " ";
  EXPECT_EQ(order, "a1 b0 c2 d0 ");
  EXPECT_EQ(index.metadata.at("format"), "pt");
  EXPECT_EQ(index.payload_bytes(), 15u);
  EXPECT_EQ(index.find("c")->offset, 20u);
  EXPECT_EQ(index.find("bb"), nullptr);
  EXPECT_EQ(index.find("zz"), nullptr);
}

TEST(Index, one_name_in_two_files_is_refused_with_both_files) {
  std::vector<FileTensors> parts(2);
  parts[0].tensors = {byte_tensor("w", 10, 4)};
  parts[1].tensors = {byte_tensor("v", 10, 4), byte_tensor("w", 14, 4)};
  const auto index = join_files({{"x", 14}, {"y", 18}}, parts);
  ASSERT_FALSE(index);
  EXPECT_EQ(index.error().code, base::Code::corrupt);
  EXPECT_EQ(index.error().message, "tensor 'w' is in two files: x and y");
}

TEST(Index, files_too_large_to_map_are_refused) {
  const auto index = join_files({{"x", kIndexBytesMax}, {"y", 1}}, std::vector<FileTensors>(2));
  ASSERT_FALSE(index);
  EXPECT_EQ(index.error().code, base::Code::unsupported);
  EXPECT_FALSE(join_files({{"x", UINT64_MAX}, {"y", UINT64_MAX}}, std::vector<FileTensors>(2)));
}

TEST(Index, no_files_make_an_empty_index) {
  const Index index = join_files({}, {}).value();
  EXPECT_EQ(index.payload_bytes(), 0u);
  EXPECT_EQ(index.find(""), nullptr);
}

TEST(Index, a_scalar_has_one_element) {
  const auto count_of = [](std::vector<uint64_t> shape) { return element_count(shape); };
  EXPECT_EQ(count_of({}), 1u);
  EXPECT_EQ(count_of({3, 0, 5}), 0u);
  EXPECT_EQ(count_of({3, 4}), 12u);
  EXPECT_EQ(count_of({uint64_t{1} << 63, 2}), std::nullopt);
}

}  // namespace tensord::tensor
