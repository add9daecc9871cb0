#include "client/plan_json.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace tensord::client {

namespace {

using nlohmann::json;

// Two files: a [4, 6] and b [3] in the first, c [2] of an unknown type in the second.
tensor::Index two_files() {
  tensor::Index index;
  index.files = {{.path = "/m/one.safetensors", .size_bytes = 1060}, {.path = "/m/two.safetensors", .size_bytes = 520}};
  index.tensors = {
      {.name = "a",
       .dtype = tensor::Dtype::f16,
       .dtype_text = "F16",
       .shape = {4, 6},
       .offset = 1000,
       .size_bytes = 48},
      {.name = "b", .dtype = tensor::Dtype::f32, .dtype_text = "F32", .shape = {3}, .offset = 1048, .size_bytes = 12},
      {.name = "c", .dtype_text = "Q5", .shape = {2}, .file = 1, .offset = 500, .size_bytes = 20},
  };
  return index;
}

}  // namespace

TEST(PlanJson, a_view_is_the_plan_of_a_packed_copy) {
  const json plan = json::parse(plan_json(two_files(), {"a[:, 0:3]", "b"}).value());
  EXPECT_EQ(plan.at("target_bytes"), 40);
  EXPECT_EQ(plan.at("items"), json::parse(R"([{"view": "a[:, 0:3]", "tensor": "a", "dtype": "F16", "shape": [4, 3],
                             "target_offset": 0, "size_bytes": 24},
                            {"view": "b", "tensor": "b", "dtype": "F32", "shape": [3], "target_offset": 24,
                             "size_bytes": 12}])"));
  EXPECT_EQ(plan.at("records"),
            json::parse(R"([{"kind": "copy", "source": 0, "source_offset": 1000, "source_pitch": 12, "row_count": 4,
                             "target_offset": 0, "target_pitch": 6, "row_bytes": 6, "outer": []},
                            {"kind": "copy", "source": 0, "source_offset": 1048, "source_pitch": 0, "row_count": 1,
                             "target_offset": 24, "target_pitch": 0, "row_bytes": 12, "outer": []},
                            {"kind": "fill", "source": 0, "source_offset": 0, "source_pitch": 0, "row_count": 1,
                             "target_offset": 36, "target_pitch": 0, "row_bytes": 4, "outer": []}])"));
}

TEST(PlanJson, without_views_it_is_the_files) {
  const json plan = json::parse(plan_json(two_files(), {}).value());
  EXPECT_EQ(plan.at("files"), json::parse(R"([{"path": "/m/one.safetensors", "size_bytes": 1060},
                                              {"path": "/m/two.safetensors", "size_bytes": 520}])"));
  EXPECT_EQ(plan.at("records"), json::array());
}

TEST(PlanJson, a_view_of_what_is_not_there_is_refused) {
  const base::Error missing = plan_json(two_files(), {"z"}).error();
  EXPECT_EQ(missing.code, base::Code::not_found);
  EXPECT_EQ(missing.message, "there is no tensor 'z'; `tensord show PATH` lists all 3");
  EXPECT_EQ(plan_json(two_files(), {"a[9]"}).error().code, base::Code::invalid_argument);
}

}  // namespace tensord::client
