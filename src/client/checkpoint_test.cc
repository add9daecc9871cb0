#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>

#include "client/model.h"

namespace tensord::client {

namespace {

using base::Code;

class CheckpointTest : public testing::Test {
 protected:
  CheckpointTest() {
    std::string name = "/tmp/tensord-checkpoint-test-XXXXXX";
    folder_ = ::mkdtemp(name.data());
  }
  ~CheckpointTest() override { std::filesystem::remove_all(folder_); }

  std::string write(const std::string& name, const std::string& text = "x") {
    const std::string path = folder_ + "/" + name;
    std::ofstream(path) << text;
    return path;
  }

  std::string refusal(const std::vector<std::string>& paths, Code code) {
    const auto found = find_checkpoint(paths);
    if (found) return "found";
    EXPECT_EQ(found.error().code, code) << found.error().message;
    return found.error().message;
  }

  std::string folder_;
};

}  // namespace

TEST_F(CheckpointTest, a_file_stands_for_itself) {
  const std::string path = write("weights.bin");
  const Checkpoint checkpoint = find_checkpoint({path}).value();
  EXPECT_EQ(checkpoint.path, path);
  EXPECT_EQ(checkpoint.files, std::vector<std::string>{path});
  EXPECT_FALSE(checkpoint.shards.has_value());
}

TEST_F(CheckpointTest, a_folder_stands_for_its_shards_its_model_or_its_only_file) {
  const std::string only = write("adapter.safetensors");
  EXPECT_EQ(find_checkpoint({folder_}).value().files, std::vector<std::string>{only});
  const std::string model = write("model.safetensors");
  EXPECT_EQ(find_checkpoint({folder_ + "/"}).value().files, std::vector<std::string>{model});
  write("model.safetensors.index.json", R"({"weight_map":{"a":"model.safetensors","b":"adapter.safetensors"}})");
  const Checkpoint sharded = find_checkpoint({folder_}).value();
  EXPECT_EQ(sharded.files, (std::vector<std::string>{only, model}));
  EXPECT_TRUE(sharded.shards.has_value());
  EXPECT_EQ(find_checkpoint({folder_ + "/model.safetensors.index.json"}).value().files, sharded.files);
}

TEST_F(CheckpointTest, a_folder_with_nothing_or_with_a_choice_is_refused) {
  EXPECT_EQ(refusal({folder_}, Code::not_found),
            folder_ + " holds neither model.safetensors.index.json nor a .safetensors file");
  write("a.safetensors");
  write("b.safetensors");
  EXPECT_NE(refusal({folder_}, Code::invalid_argument).find("name the files that belong together"), std::string::npos);
}

TEST_F(CheckpointTest, a_missing_shard_is_named_with_the_index_that_wants_it) {
  const std::string index = write("model.safetensors.index.json", R"({"weight_map":{"a":"gone.safetensors"}})");
  EXPECT_EQ(refusal({folder_}, Code::not_found),
            "open " + folder_ + "/gone.safetensors: No such file or directory " + "(a shard that " + index + " names)");
}

TEST_F(CheckpointTest, shards_outside_of_the_folder_are_refused) {
  for (const char* name : {"../x", "/etc/passwd", "a/../../x", ""}) {
    write("model.safetensors.index.json", R"({"weight_map":{"a":")" + std::string(name) + R"("}})");
    EXPECT_NE(refusal({folder_}, Code::corrupt), "found") << name;
  }
}

TEST_F(CheckpointTest, what_is_no_regular_file_is_refused_without_waiting_for_it) {
  const std::string fifo = folder_ + "/fifo";
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  EXPECT_EQ(refusal({fifo}, Code::invalid_argument), fifo + " is a FIFO, a regular file is needed");
  EXPECT_EQ(refusal({"/dev/null"}, Code::invalid_argument), "/dev/null is a device, a regular file is needed");
  EXPECT_EQ(refusal({folder_, folder_}, Code::invalid_argument), folder_ + " is a directory, a regular file is needed");
}

TEST_F(CheckpointTest, paths_that_make_no_sense_are_refused) {
  EXPECT_EQ(refusal({}, Code::invalid_argument), "open: no path was given");
  EXPECT_EQ(refusal({""}, Code::invalid_argument), "open: an empty path");
  EXPECT_EQ(refusal({std::string("a\0b", 3)}, Code::invalid_argument), "open: a path with a NUL byte");
  EXPECT_EQ(refusal({folder_ + "/none"}, Code::not_found), "open " + folder_ + "/none: No such file or directory");
}

}  // namespace tensord::client
