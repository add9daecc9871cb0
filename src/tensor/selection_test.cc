#include "tensor/selection.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "base/text.h"

namespace tensord::tensor {
namespace {

Index index_of(const std::vector<std::pair<std::string, uint64_t>>& tensors) {
  Index index;
  index.files.push_back({"f", 0});
  for (const auto& [name, size_bytes] : tensors) {
    index.tensors.push_back({.name = name,
                             .dtype = Dtype::u8,
                             .shape = {size_bytes},
                             .offset = index.files[0].size_bytes,
                             .size_bytes = size_bytes});
    index.files[0].size_bytes += size_bytes;
  }
  std::sort(index.tensors.begin(), index.tensors.end(),
            [](const Tensor& a, const Tensor& b) { return a.name < b.name; });
  return index;
}

std::string selected(const Index& index, const std::vector<std::string>& only) {
  const auto positions = select(index, only);
  if (!positions) return base::text(base::code_name(positions.error().code), ": ", positions.error().message);
  std::string out;
  for (const Tensor& tensor : take(index, *positions).tensors) out += tensor.name + " ";
  return out;
}

}  // namespace

TEST(Selection, patterns_match_as_a_shell_does) {
  for (const auto& [pattern, name] :
       std::vector<std::pair<std::string, std::string>>{{"*", ""},
                                                        {"*", "a.b"},
                                                        {"a", "a"},
                                                        {"a*", "a"},
                                                        {"*a", "aba"},
                                                        {"a*b*c", "a.b.b.c"},
                                                        {"layers.1[0-9].*", "layers.17.w"},
                                                        {"layers.?.*", "layers.7.w"},
                                                        {"x[!0-9]", "xa"},
                                                        {"x[]]", "x]"},
                                                        {"x[a-]", "x-"},
                                                        {"x[", "x["},
                                                        {"x[0", "x[0"},
                                                        {"**", "abc"}}) {
    EXPECT_TRUE(matches(pattern, name)) << pattern << " " << name;
  }
  for (const auto& [pattern, name] : std::vector<std::pair<std::string, std::string>>{{"", "a"},
                                                                                      {"a", "ab"},
                                                                                      {"a", "A"},
                                                                                      {"*a", "ab"},
                                                                                      {"layers.1[0-9].*", "layers.1.w"},
                                                                                      {"layers.?.*", "layers.17.w"},
                                                                                      {"x[!0-9]", "x5"},
                                                                                      {"x[0-9]", "x"},
                                                                                      {"?", ""}}) {
    EXPECT_FALSE(matches(pattern, name)) << pattern << " " << name;
  }
}

TEST(Selection, many_stars_take_no_long) {
  std::string pattern;
  for (int i = 0; i < 1000; ++i) pattern += "*a";
  EXPECT_FALSE(matches(pattern + "b", std::string(3000, 'a')));
}

TEST(Selection, names_come_before_patterns_and_each_tensor_once) {
  const Index index = index_of({{"a0", 1}, {"a1", 1}, {"a[0-9]", 1}, {"b", 1}});
  EXPECT_EQ(selected(index, {"a[0-9]"}), "a[0-9] ");
  EXPECT_EQ(selected(index, {"b", "a?", "a0", "*1"}), "a0 a1 b ");
  EXPECT_EQ(selected(index, {}), "");
}

TEST(Selection, what_matches_nothing_is_not_found_with_the_nearest_name) {
  const Index index = index_of({{"lm_head.weight", 1}, {"norm", 1}});
  EXPECT_EQ(selected(index, {"norm", "lm_head.weigth"}),
            "not_found: only: no tensor is or matches 'lm_head.weigth'; did you mean 'lm_head.weight'?");
  EXPECT_EQ(selected(index, {"vision.*"}), "not_found: only: no tensor is or matches 'vision.*'");
  EXPECT_EQ(selected(index, std::vector<std::string>(kOnlyCountMax + 1, "norm")).substr(0, 16), "invalid_argument");
}

TEST(Selection, batches_are_consecutive_tensors_in_file_order) {
  const Index index = index_of({{"z", 40}, {"y", 60}, {"x", 1}, {"w", 500}, {"v", 0}, {"u", 100}});
  std::string out;
  const std::vector<uint32_t> numbers = batch_numbers(index, 100);
  for (size_t at = 0; at < numbers.size(); ++at) out += base::text(index.tensors[at].name, numbers[at], " ");
  EXPECT_EQ(out, "u3 v3 w2 x1 y0 z0 ");
}

}  // namespace tensord::tensor
