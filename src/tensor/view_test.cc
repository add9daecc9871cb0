#include "tensor/view.h"

#include <gtest/gtest.h>

#include <limits>

namespace tensord::tensor {
namespace {

Tensor tensor_of(Dtype dtype, std::vector<uint64_t> shape) {
  Tensor tensor;
  tensor.name = "w";
  tensor.dtype = dtype;
  tensor.dtype_text = std::string(dtype_name(dtype));
  tensor.shape = std::move(shape);
  tensor.size_bytes = *element_count(tensor.shape) * dtype_bits(dtype) / 8;
  return tensor;
}

Result<Strided> slice(const Tensor& tensor, std::string_view items, uint64_t offset = 0) {
  const auto item = parse_view_item("w[" + std::string(items) + "]");
  EXPECT_TRUE(item) << items;
  return resolve(tensor, item->items, offset);
}

TEST(View, a_slice_of_a_vector_keeps_its_alignment) {
  const auto region = slice(tensor_of(Dtype::f32, {8}), "2:6", 1000);
  EXPECT_EQ(region.value(), (Strided{1008, {4}, {4}, 4}));
}

TEST(View, steps_and_negative_steps_multiply_strides) {
  const Tensor tensor = tensor_of(Dtype::f16, {4, 6});
  EXPECT_EQ(slice(tensor, "::2, ::-1").value(), (Strided{10, {2, 6}, {24, -2}, 2}));
  EXPECT_EQ(slice(tensor, "5:0:-2").value(), (Strided{36, {2, 6}, {-24, 2}, 2}));
}

TEST(View, integers_remove_dimensions_and_none_adds_them) {
  const Tensor tensor = tensor_of(Dtype::u8, {4, 5, 6});
  EXPECT_EQ(slice(tensor, "1, ..., None, -1").value(), (Strided{35, {5, 1}, {6, 0}, 1}));
  EXPECT_EQ(slice(tensor, "1, 2, 3").value(), (Strided{45, {}, {}, 1}));
}

TEST(View, slices_are_clipped_as_numpy_clips_them) {
  const Tensor tensor = tensor_of(Dtype::u8, {8});
  EXPECT_EQ(slice(tensor, "6:100")->shape[0], 2u);
  EXPECT_EQ(slice(tensor, "-100:3")->shape[0], 3u);
  EXPECT_EQ(slice(tensor, "8:")->shape[0], 0u);
  EXPECT_EQ(slice(tensor, "5:2")->shape[0], 0u);
  EXPECT_EQ(slice(tensor, "2:5:-1")->shape[0], 0u);
  EXPECT_EQ(slice(tensor, "::-9223372036854775808").value(), (Strided{7, {1}, {1}, 1}));
  EXPECT_EQ(slice(tensor, "::9223372036854775807").value(), (Strided{0, {1}, {1}, 1}));
}

TEST(View, what_numpy_refuses_is_refused_with_the_place) {
  const Tensor tensor = tensor_of(Dtype::u8, {8, 4});
  const std::pair<const char*, const char*> refused[] = {
      {"8", "slice tensor 'w': dimension 0: index 8 is out of range for extent 8"},
      {":, -5", "slice tensor 'w': dimension 1: index -5 is out of range for extent 4"},
      {"::0", "slice tensor 'w': dimension 0: the step of a slice must not be 0"},
      {"0, 0, 0", "slice tensor 'w': too many indices: 3 for 2 dimensions"},
      {"..., ...", "slice tensor 'w': an index may hold one '...' only"},
  };
  for (const auto& [items, message] : refused) {
    const auto region = slice(tensor, items);
    ASSERT_FALSE(region) << items;
    EXPECT_EQ(region.error().code, base::Code::invalid_argument);
    EXPECT_EQ(region.error().message, message);
  }
}

TEST(View, too_many_new_axes_are_refused) {
  IndexItems items(65, IndexItem{.kind = IndexItem::Kind::new_axis});
  EXPECT_FALSE(resolve(tensor_of(Dtype::u8, {}), items));
  items.pop_back();
  EXPECT_TRUE(resolve(tensor_of(Dtype::u8, {}), items));
}

TEST(View, empty_tensors_of_any_extent_have_regions) {
  const Tensor tensor = tensor_of(Dtype::f64, {0, uint64_t{1} << 63, 4});
  EXPECT_EQ(whole(tensor).element_count(), 0u);
  EXPECT_EQ(slice(tensor, ":, 9000000000000000000").value().element_count(), 0u);
}

TEST(View, half_byte_elements_are_regions_of_bytes) {
  const Tensor tensor = tensor_of(Dtype::f4, {4, 8});
  EXPECT_EQ(whole(tensor, 5), (Strided{5, {16}, {1}, 1}));
  EXPECT_EQ(slice(tensor, "...").value(), (Strided{0, {16}, {1}, 1}));
  EXPECT_EQ(slice(tensor, "1:3").value(), (Strided{4, {2, 4}, {4, 1}, 1}));
  EXPECT_EQ(slice(tensor, "1, 2:6").value(), (Strided{5, {2}, {1}, 1}));
  EXPECT_EQ(slice(tensor, "4:").value().element_count(), 0u);
  for (const char* items : {":, 1:3", ":, 0:3", "0, 0", ":, ::2", "::-1", ":, 0"})
    EXPECT_FALSE(slice(tensor, items)) << items;
}

TEST(View, three_quarter_byte_elements_are_sliced_in_fours) {
  const Tensor tensor = tensor_of(Dtype::f6_e2m3, {2, 8});
  EXPECT_EQ(slice(tensor, ":, 4:8").value(), (Strided{3, {2, 3}, {6, 1}, 1}));
  EXPECT_FALSE(slice(tensor, ":, 2:6"));
}

TEST(View, a_region_may_be_of_other_elements_than_the_tensor_and_repeat_them) {
  const Tensor tensor = tensor_of(Dtype::bf16, {4, 6});  // 48 bytes
  EXPECT_EQ(reinterpret(tensor, Dtype::u8, {2, {3, 4}, {12, 2}}, 1000).value(), (Strided{1002, {3, 4}, {12, 2}, 1}));
  EXPECT_EQ(reinterpret(tensor, Dtype::f64, {40, {7}, {0}}).value(), (Strided{40, {7}, {0}, 8}));
  EXPECT_EQ(reinterpret(tensor, Dtype::i16, {46, {24}, {-2}}).value(), (Strided{46, {24}, {-2}, 2}));
  EXPECT_TRUE(reinterpret(tensor, Dtype::f32, {44, {}, {}}));
  EXPECT_TRUE(reinterpret(tensor, Dtype::f32, {9999, {2, 0}, {1, 1}}));  // no element, no place
}

TEST(View, a_region_that_leaves_its_tensor_is_refused) {
  const Tensor tensor = tensor_of(Dtype::bf16, {4, 6});
  constexpr int64_t kFar = std::numeric_limits<int64_t>::max();
  const std::pair<Dtype, Strided> refused[] = {
      {Dtype::f32, {45, {}, {}}},
      {Dtype::bf16, {2, {24}, {2}}},
      {Dtype::bf16, {44, {24}, {-2}}},
      {Dtype::bf16, {0, {2}, {kFar}}},
      {Dtype::bf16, {0, {2, 2}, {kFar, -kFar}}},
      {Dtype::bf16, {0, {UINT64_MAX, UINT64_MAX, UINT64_MAX}, {kFar, kFar, kFar}}},
      {Dtype::bf16, {UINT64_MAX, {1}, {2}}},
      {Dtype::f4, {0, {4}, {1}}},
      {Dtype::opaque, {0, {4}, {1}}},
      {Dtype::u8, {0, {4, 4}, {1}}},
  };
  for (const auto& [dtype, region] : refused) {
    const auto read = reinterpret(tensor, dtype, region);
    ASSERT_FALSE(read) << region.offset;
    EXPECT_EQ(read.error().code, base::Code::invalid_argument);
  }
}

TEST(View, text_is_read_as_python_writes_it) {
  const auto item = parse_view_item("model.layers.0.w[ 1:-2 , ..., None,-1, ::2,:]").value();
  EXPECT_EQ(item.name, "model.layers.0.w");
  EXPECT_EQ(to_text(item), "model.layers.0.w[1:-2, ..., None, -1, ::2, :]");
  EXPECT_EQ(parse_view_item(to_text(item)).value(), item);
  EXPECT_EQ(parse_view_item("w[0,]").value().items.size(), 1u);
}

TEST(View, names_may_hold_brackets) {
  for (const char* name : {"w", "a[0].b", "a[0]", "a]", "a[", "[]", "", "a[b]c[1:2]d]"}) {
    const ViewItem bare{name, {}};
    EXPECT_EQ(parse_view_item(to_text(bare)).value(), bare) << to_text(bare);
    const ViewItem sliced{name, {IndexItem{.start = 1, .stop = 3}}};
    EXPECT_EQ(parse_view_item(to_text(sliced)).value(), sliced) << to_text(sliced);
  }
}

TEST(View, text_that_makes_no_sense_shows_where) {
  const std::pair<const char*, const char*> refused[] = {
      {"w[x]", "view 'w[x]': expected a number, a slice, '...' or 'None' at character 3"},
      {"w[0:1:2:3]", "view 'w[0:1:2:3]': expected ',' or ']' at character 8"},
      {"w[0 1]", "view 'w[0 1]': expected ',' or ']' at character 5"},
      {"w[,]", "view 'w[,]': expected a number, a slice, '...' or 'None' at character 3"},
      {"w[99999999999999999999]", "view 'w[99999999999999999999]': expected a 64-bit number at character 3"},
      {"w[-]", "view 'w[-]': expected a 64-bit number at character 3"},
  };
  for (const auto& [text, message] : refused) {
    const auto item = parse_view_item(text);
    ASSERT_FALSE(item) << text;
    EXPECT_EQ(item.error().message, message);
  }
}

}  // namespace
}  // namespace tensord::tensor
