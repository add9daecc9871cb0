// What holds for every Source.
#include <gtest/gtest.h>

#include <fcntl.h>

#include <atomic>
#include <latch>
#include <random>
#include <thread>

#include "storage/file_source.h"
#include "storage/memory_source_testing.h"
#include "storage/source_testing.h"

namespace tensord::storage {
namespace {

using base::Code;
using Bytes = std::vector<std::byte>;

class FileOrMemory : public testing::TestWithParam<const char*> {
 protected:
  std::unique_ptr<Source> make(std::vector<Bytes> files) {
    if (GetParam() == std::string("memory")) return make_memory_source({.files = std::move(files)});
    std::vector<SourceFile> opened;
    for (const Bytes& bytes : files) {
      const std::string path = folder_.write(std::to_string(opened.size()), bytes);
      base::Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
      const auto identity = base::identify_file(fd.get(), path).value();
      opened.push_back({std::move(fd), path, identity});
    }
    FileSourceOptions options;
    const std::string kind = GetParam();
    if (kind == "file_plain") options.cached_path = CachedPath::plain;
    if (kind == "file_mapped") options.cached_path = CachedPath::mapped;
    if (kind == "file_io_uring" || kind == "file_direct_pread") {
      if (!direct_) direct_ = kind == "file_io_uring" ? start_uring_reader().value() : start_pread_reader().value();
      options.direct = direct_.get();
      for (const SourceFile& file : opened) {
        EXPECT_EQ(::fdatasync(file.fd.get()), 0);
        EXPECT_EQ(::posix_fadvise(file.fd.get(), 0, 0, POSIX_FADV_DONTNEED), 0);
      }
    }
    return make_file_source(std::move(opened), *pool_, std::move(options));
  }

 private:
  ScratchFolder folder_;
  std::unique_ptr<DirectReader> direct_;
  std::unique_ptr<ReadPool> pool_ = start_read_pool(3).value();
};

std::vector<Bytes> sample_files(const std::vector<size_t>& sizes) {
  std::vector<Bytes> files;
  for (const size_t size : sizes) files.push_back(sample_bytes(size, static_cast<uint32_t>(files.size())));
  return files;
}

INSTANTIATE_TEST_SUITE_P(Source, FileOrMemory,
                         testing::Values("file", "file_plain", "file_mapped", "file_io_uring", "file_direct_pread",
                                         "memory"),
                         [](const auto& name) { return std::string(name.param); });

TEST_P(FileOrMemory, partitions_are_read_in_steps) {
  const auto files = sample_files({5 << 10, 3 << 10, 2 << 10, 10 << 10});
  auto source = make(files);
  for (uint32_t file = 0; file < files.size(); ++file) {
    Bytes read(files[file].size());
    for (size_t offset = 0; offset < read.size(); offset += 1024) {
      ASSERT_TRUE(read_now(*source, file, offset, std::span(read).subspan(offset, 1024)));
    }
    EXPECT_EQ(read, files[file]) << file;
  }
  EXPECT_EQ(source->counters().read_count, 20u);
  EXPECT_EQ(source->counters().read_bytes, 20u << 10);
}

TEST_P(FileOrMemory, a_range_across_two_partitions_is_a_read_of_each) {
  const auto files = sample_files({5 << 10, 5 << 10});
  auto source = make(files);
  Bytes read(2 << 10);
  ASSERT_TRUE(read_now(*source, 0, 4 << 10, std::span(read).first(1 << 10)));
  ASSERT_TRUE(read_now(*source, 1, 0, std::span(read).last(1 << 10)));
  EXPECT_TRUE(std::equal(read.begin(), read.begin() + (1 << 10), files[0].end() - (1 << 10)));
  EXPECT_TRUE(std::equal(read.begin() + (1 << 10), read.end(), files[1].begin()));
}

TEST_P(FileOrMemory, reads_of_any_place_and_size_bring_the_bytes_of_that_place) {
  const uint32_t seed = static_cast<uint32_t>(GTEST_FLAG_GET(random_seed));
  SCOPED_TRACE("--gtest_random_seed=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  const auto files = sample_files({1, 4095, 4097, 70'001});
  auto source = make(files);
  for (int i = 0; i < 500; ++i) {
    const uint32_t file = random() % files.size();
    const size_t offset = random() % (files[file].size() + 1);
    Bytes read(random() % (files[file].size() - offset + 1));
    ASSERT_TRUE(read_now(*source, file, offset, read));
    ASSERT_TRUE(std::equal(read.begin(), read.end(), files[file].begin() + static_cast<ptrdiff_t>(offset)));
  }
}

TEST_P(FileOrMemory, nothing_can_be_read_anywhere_up_to_the_end) {
  auto source = make(sample_files({10, 0}));
  EXPECT_TRUE(read_now(*source, 0, 10, {}));
  EXPECT_TRUE(read_now(*source, 1, 0, {}));
}

TEST_P(FileOrMemory, what_lies_past_the_end_is_corrupt_and_never_a_short_read) {
  auto source = make(sample_files({1024}));
  Bytes read(2048);
  struct Range {
    uint64_t offset;
    size_t size_bytes;
  };
  for (const Range range : {Range{0, 2048}, {1023, 2}, {1024, 1}, {2048, 1}, {1025, 0}, {UINT64_MAX, 2}}) {
    const Status status = read_now(*source, 0, range.offset, std::span(read).first(range.size_bytes));
    ASSERT_FALSE(status) << range.offset;
    EXPECT_EQ(status.error().code, Code::corrupt);
    EXPECT_NE(status.error().message.find("0 at " + std::to_string(range.offset)), std::string::npos)
        << status.error().message;
  }
  EXPECT_EQ(source->counters().read_count, 0u);
}

TEST_P(FileOrMemory, done_is_called_once_for_each_read_of_many_threads) {
  constexpr int kThreadCount = 4, kReadCount = 250;
  const auto files = sample_files({64 << 10});
  Bytes target(kThreadCount * kReadCount * 64);
  std::vector<std::atomic<int>> called(kThreadCount * kReadCount);
  std::latch all_done(kThreadCount * kReadCount);
  auto source = make(files);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreadCount; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = thread * kReadCount; i < (thread + 1) * kReadCount; ++i) {
        source->read({0, static_cast<uint64_t>(i) * 64, std::span(target).subspan(i * 64, 64),
                      [&, i](Status status, ReadTiming) {
                        EXPECT_TRUE(status);
                        ++called[i];
                        all_done.count_down();
                      }});
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  all_done.wait();
  for (const auto& count : called) EXPECT_EQ(count, 1);
  EXPECT_TRUE(std::equal(target.begin(), target.end(), files[0].begin()));
}

TEST_P(FileOrMemory, done_may_ask_for_the_next_read) {
  const auto files = sample_files({100});
  Bytes read(100);
  std::promise<void> finished;
  std::unique_ptr<Source> source;
  std::function<void(size_t)> read_from = [&](size_t offset) {
    if (offset == read.size()) return finished.set_value();
    source->read({0, offset, std::span(read).subspan(offset, 1), [&, offset](Status status, ReadTiming) {
                    EXPECT_TRUE(status);
                    read_from(offset + 1);
                  }});
  };
  source = make(files);
  read_from(0);
  finished.get_future().wait();
  source.reset();
  EXPECT_EQ(read, files[0]);
}

// Each target is scribbled over by its `done`, as an owner would that frees it there.
TEST_P(FileOrMemory, nothing_is_written_after_done_however_the_cancel_falls) {
  const uint32_t seed = static_cast<uint32_t>(GTEST_FLAG_GET(random_seed));
  SCOPED_TRACE("--gtest_random_seed=" + std::to_string(seed));
  std::mt19937 random(seed);
  constexpr std::byte kFreed{0xdd};
  constexpr size_t kReadCount = 64, kReadBytes = 16 << 10;
  for (int round = 0; round < 30; ++round) {
    std::vector<Bytes> targets(kReadCount, Bytes(kReadBytes));
    const size_t cancel_at = random() % kReadCount;
    std::atomic<size_t> done_count = 0;
    {
      auto source = make(sample_files({kReadCount * kReadBytes}));
      for (size_t i = 0; i < kReadCount; ++i) {
        if (i == cancel_at) source->cancel();
        source->read({0, i * kReadBytes, targets[i], [&, i](Status status, ReadTiming) {
                        EXPECT_TRUE(status || status.error().code == Code::cancelled);
                        EXPECT_FALSE(status && i >= cancel_at);
                        std::fill(targets[i].begin(), targets[i].end(), kFreed);
                        ++done_count;
                      }});
      }
    }
    EXPECT_EQ(done_count, kReadCount) << "the source waits for them all before it goes";
    for (const Bytes& target : targets) EXPECT_EQ(target, Bytes(kReadBytes, kFreed));
  }
}

TEST_P(FileOrMemory, after_cancel_every_read_is_refused) {
  auto source = make(sample_files({16}));
  source->cancel();
  source->cancel();
  Bytes read(16);
  for (const size_t size_bytes : {16, 0}) {
    EXPECT_EQ(read_now(*source, 0, 0, std::span(read).first(size_bytes)).error().code, Code::cancelled);
  }
  EXPECT_EQ(read, Bytes(16));
}

// Targets are as far from a block's beginning as their bytes are, as in an image, and also not.
TEST_P(FileOrMemory, pieces_are_the_targets_bytes_each_once_and_in_order) {
  const auto files = sample_files({(9 << 20) + 1234});
  auto source = make(files);
  constexpr size_t kBlock = 4096;
  Bytes memory(files[0].size() + 3 * kBlock, std::byte{0xa5});
  const size_t base_at = -reinterpret_cast<uint64_t>(memory.data()) % kBlock + kBlock;
  struct Range {
    uint64_t offset;
    size_t size_bytes;
    size_t shift;
  };
  for (const Range range : {Range{0, files[0].size(), 0},
                            {100, 5 << 20, 100},
                            {4096, 1 << 20, 0},
                            {4095, 70'000, 4095},
                            {4095, 70'000, 31},
                            {8 << 20, (1 << 20) + 1234, 0},
                            {5, 1234, 5}}) {
    const std::span<std::byte> target = std::span(memory).subspan(base_at + range.shift, range.size_bytes);
    std::fill(target.begin(), target.end(), std::byte{0xa5});
    Bytes seen;
    int begin_count = 0;
    auto done = std::make_shared<std::promise<Status>>();
    source->read({.file = 0,
                  .offset = range.offset,
                  .target = target,
                  .done = [done](Status status, ReadTiming) { done->set_value(std::move(status)); },
                  .begin = [&] { ++begin_count; },
                  .piece =
                      [&](uint64_t at, std::span<const std::byte> bytes) {
                        EXPECT_EQ(at, seen.size());
                        EXPECT_EQ(begin_count, 1);
                        seen.insert(seen.end(), bytes.begin(), bytes.end());
                      }});
    const Status status = done->get_future().get();
    ASSERT_TRUE(status) << status.error().message;
    const auto expected = std::span(files[0]).subspan(range.offset, range.size_bytes);
    EXPECT_TRUE(std::equal(seen.begin(), seen.end(), expected.begin(), expected.end())) << range.offset;
    EXPECT_TRUE(std::equal(target.begin(), target.end(), expected.begin())) << range.offset;
    EXPECT_EQ(memory[base_at + range.shift - 1], std::byte{0xa5});
    EXPECT_EQ(memory[base_at + range.shift + range.size_bytes], std::byte{0xa5});
    std::fill(memory.begin(), memory.end(), std::byte{0xa5});
  }
}

TEST_P(FileOrMemory, files_that_nobody_touched_are_unchanged) {
  auto source = make(sample_files({16, 0, 3}));
  for (uint32_t file = 0; file < 3; ++file) EXPECT_TRUE(source->check_unchanged(file));
}

}  // namespace
}  // namespace tensord::storage
