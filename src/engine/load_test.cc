#include "engine/load.h"

#include <gtest/gtest.h>

#include <cstring>
#include <future>
#include <random>

#include "storage/memory_source_testing.h"
#include "tensor/safetensors.h"

namespace tensord::engine {

namespace {

using base::Code;

// Two files: tensor a of 3 MiB and a bit, tensor b of 5 bytes; tensor c of 2 MiB.
struct Checkpoint {
  std::vector<std::vector<std::byte>> files;
  std::shared_ptr<Content> content = std::make_shared<Content>();
};

tensor::FileTensors add_file(Checkpoint& checkpoint, const std::string& header, size_t data_bytes) {
  std::mt19937_64 random(checkpoint.files.size() + 1);
  std::vector<std::byte> file(8 + header.size() + data_bytes);
  const uint64_t header_bytes = header.size();
  std::memcpy(file.data(), &header_bytes, 8);
  std::memcpy(file.data() + 8, header.data(), header.size());
  for (size_t at = 8 + header.size(); at < file.size(); ++at) file[at] = static_cast<std::byte>(random());
  const std::string path = "file" + std::to_string(checkpoint.files.size());
  auto part = tensor::parse_safetensors(header, file.size(), path).value();
  checkpoint.files.push_back(std::move(file));
  return part;
}

Checkpoint make_checkpoint() {
  Checkpoint checkpoint;
  std::vector<tensor::FileTensors> parts;
  parts.push_back(add_file(checkpoint,
                           R"({"a":{"dtype":"U8","shape":[3145999],"data_offsets":[0,3145999]},)"
                           R"("b":{"dtype":"U8","shape":[5],"data_offsets":[3145999,3146004]}})",
                           3146004));
  parts.push_back(
      add_file(checkpoint, R"({"c":{"dtype":"F32","shape":[1024,512],"data_offsets":[0,2097152]}})", 2097152));
  Content& content = *checkpoint.content;
  content.index = tensor::join_files({{"file0", checkpoint.files[0].size()}, {"file1", checkpoint.files[1].size()}},
                                     std::move(parts))
                      .value();
  content.layout = tensor::lay_out(content.index);
  return checkpoint;
}

struct Outcome {
  LoadResult result;
  std::vector<std::byte> image;
  memory::FillMap fill;
};

struct Wishes {
  std::vector<storage::Fault> faults;
  bool changed = false;
  std::vector<tensor::Digest> expected;
};

Outcome run_load(const Checkpoint& checkpoint, Wishes wishes = {}) {
  const tensor::ImageLayout& layout = checkpoint.content->layout;
  Outcome run{.image = std::vector<std::byte>(layout.size_bytes),
              .fill = memory::FillMap::create(layout.blocks.size(), layout.size_bytes).value()};
  std::promise<LoadResult> promise;
  auto source = storage::make_memory_source(
      {.files = checkpoint.files, .faults = std::move(wishes.faults), .changed = wishes.changed});
  Load load({.content = checkpoint.content,
             .source = std::move(source),
             .image = run.image.data(),
             .fill = &run.fill,
             .expected = std::move(wishes.expected)},
            [&](LoadResult result) { promise.set_value(std::move(result)); });
  load.start();
  run.result = promise.get_future().get();
  return run;
}

}  // namespace

TEST(Load, fills_the_image_with_every_byte_of_every_file) {
  const Checkpoint checkpoint = make_checkpoint();
  const Outcome run = run_load(checkpoint);
  ASSERT_TRUE(run.result.status) << run.result.status.error().message;
  for (size_t file = 0; file < checkpoint.files.size(); ++file) {
    const auto begin =
        run.image.begin() + static_cast<ptrdiff_t>(checkpoint.content->layout.windows.list[file].image_offset);
    EXPECT_TRUE(std::equal(checkpoint.files[file].begin(), checkpoint.files[file].end(), begin));
  }
  EXPECT_EQ(run.fill.ready_bytes(), checkpoint.files[0].size() + checkpoint.files[1].size());
  EXPECT_EQ(run.result.counters.bytes, run.fill.ready_bytes());
}

TEST(Load, equal_bytes_pass_the_check_against_the_record) {
  const Checkpoint checkpoint = make_checkpoint();
  const Outcome first = run_load(checkpoint);
  const Outcome second = run_load(checkpoint, {.expected = first.result.leaves});
  ASSERT_TRUE(second.result.status);
  EXPECT_EQ(second.result.artifact_id, first.result.artifact_id);
}

TEST(Load, one_flipped_bit_is_named_with_file_tensor_and_leaf_and_never_marked) {
  Checkpoint checkpoint = make_checkpoint();
  const Outcome first = run_load(checkpoint);
  checkpoint.files[0].back() ^= std::byte{1};  // the last byte of b
  const Outcome second = run_load(checkpoint, {.expected = first.result.leaves});
  ASSERT_FALSE(second.result.status);
  EXPECT_EQ(second.result.status.error().code, Code::corrupt);
  EXPECT_TRUE(second.result.status.error().message.starts_with("file0: tensor 'b', leaf 0 (5 bytes at "))
      << second.result.status.error().message;
  EXPECT_LT(second.fill.ready_bytes(), checkpoint.files[0].size() + checkpoint.files[1].size());
}

TEST(Load, a_read_error_ends_it_with_that_error) {
  const Outcome run = run_load(
      make_checkpoint(),
      {.faults = {
           {.file = 1, .offset = 5000, .error = {Code::unavailable, "read file1 at 5000: input/output error"}}}});
  ASSERT_FALSE(run.result.status);
  EXPECT_EQ(run.result.status.error().message, "read file1 at 5000: input/output error");
}

TEST(Load, a_file_that_changed_meanwhile_is_told_rather_than_what_it_looked_like) {
  const Outcome quiet = run_load(make_checkpoint(), {.changed = true});
  EXPECT_EQ(quiet.result.status.error().code, Code::changed);
  EXPECT_EQ(quiet.fill.ready_bytes(), 0u) << "what may be half old and half new is shown to nobody";
  const Outcome torn = run_load(
      make_checkpoint(), {.faults = {{.file = 1, .offset = 5000, .error = {Code::corrupt, "short"}}}, .changed = true});
  EXPECT_EQ(torn.result.status.error().code, Code::changed);
}

TEST(Load, a_cancelled_one_ends_with_the_reason_it_was_given) {
  const Checkpoint checkpoint = make_checkpoint();
  const tensor::ImageLayout& layout = checkpoint.content->layout;
  std::vector<std::byte> image(layout.size_bytes);
  memory::FillMap fill = memory::FillMap::create(layout.blocks.size(), layout.size_bytes).value();
  std::promise<LoadResult> promise;
  Load load({.content = checkpoint.content,
             .source = storage::make_memory_source({.files = checkpoint.files, .hold = true}),
             .image = image.data(),
             .fill = &fill},
            [&](LoadResult result) { promise.set_value(std::move(result)); });
  load.start();
  load.cancel({Code::cancelled, "no longer wanted"});
  const LoadResult result = promise.get_future().get();
  EXPECT_EQ(result.status.error().message, "no longer wanted");
  EXPECT_EQ(fill.ready_bytes(), 0u);
}

TEST(Load, blocks_that_are_waited_for_are_read_before_others) {
  const Checkpoint checkpoint = make_checkpoint();
  const tensor::ImageLayout& layout = checkpoint.content->layout;
  std::vector<std::byte> image(layout.size_bytes);
  memory::FillMap fill = memory::FillMap::create(layout.blocks.size(), layout.size_bytes).value();
  const memory::FillView view = memory::FillView::open(base::duplicate(fill.fd()).value()).value();
  std::promise<LoadResult> promise;
  auto held = storage::make_memory_source({.files = checkpoint.files, .hold = true});
  storage::MemorySource& source = *held;
  Load load({.content = checkpoint.content,
             .source = std::move(held),
             .image = image.data(),
             .fill = &fill,
             .thread_count = 1,
             .in_flight_bytes_max = 1},
            [&](LoadResult result) { promise.set_value(std::move(result)); });
  load.start();
  ASSERT_EQ(source.held_count(), 2u) << "two reads a thread";
  const auto block_count = static_cast<uint32_t>(layout.blocks.size());
  load.want(block_count - 1, block_count);
  load.want(block_count, block_count + 7);  // no such blocks
  source.release_reads(1);
  source.release_reads(2);
  EXPECT_TRUE(view.has_blocks(block_count - 1, block_count));
  EXPECT_FALSE(view.has_blocks(block_count - 2, block_count - 1));
  while (source.held_count() > 0) source.release_reads();
  const LoadResult result = promise.get_future().get();
  ASSERT_TRUE(result.status) << result.status.error().message;
  EXPECT_EQ(fill.ready_bytes(), checkpoint.files[0].size() + checkpoint.files[1].size());
}

}  // namespace tensord::engine
