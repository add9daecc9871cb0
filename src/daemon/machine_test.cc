#include "daemon/machine.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

#include "base/bytes.h"

namespace tensord::daemon {

namespace {

using base::kGiB;
using base::kMiB;

class MemoryLimitTest : public testing::Test {
 protected:
  MemoryLimitTest() {
    std::string name = "/tmp/tensord-limit-test-XXXXXX";
    root_ = ::mkdtemp(name.data());
  }
  ~MemoryLimitTest() override { std::filesystem::remove_all(root_); }

  void write(const std::string& file, const std::string& content) {
    const std::filesystem::path path = root_ + "/tree/" + file;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path) << content << "\n";
  }
  uint64_t limit(const std::string& groups) {
    std::ofstream(root_ + "/groups") << groups;
    return cgroup_memory_limit(root_ + "/groups", root_ + "/tree");
  }

  std::string root_;
};

}  // namespace

TEST(Machine, the_fastest_path_is_read_where_the_doctor_keeps_it_and_nowhere_else) {
  std::string folder = "/tmp/tensord-machine-test-XXXXXX";
  ASSERT_NE(::mkdtemp(folder.data()), nullptr);
  EXPECT_EQ(fastest_cached_path(folder, "this"), "");
  const std::string file = folder + "/machine.json";
  std::ofstream(file) << R"({"machine": "this", "fastest_cached": "cache_mapped", "bytes_per_s": {"disk_direct": 0}})";
  EXPECT_EQ(fastest_cached_path(folder, "this"), "cache_mapped");
  EXPECT_EQ(fastest_cached_path(folder, "another"), "");
  for (const char* hostile : {"", "[]", "{}", "{\"machine\": 7}", "\xff{", "{\"machine\": \"this\"}",
                              "{\"machine\": \"this\", \"fastest_cached\": 7}"}) {
    std::ofstream(file) << hostile;
    EXPECT_EQ(fastest_cached_path(folder, "this"), "") << hostile;
  }
  std::ofstream(file) << std::string(1 << 20, ' ') << R"({"machine": "this", "fastest_cached": "cache_mapped"})";
  EXPECT_EQ(fastest_cached_path(folder, "this"), "") << "too large";
  std::filesystem::remove_all(folder);
}

TEST_F(MemoryLimitTest, the_lowest_from_the_group_up_to_the_root_counts) {
  EXPECT_EQ(limit("0::/a/b\n"), UINT64_MAX);
  write("a/b/memory.max", "max");
  write("a/memory.max", "4096000");
  EXPECT_EQ(limit("0::/a/b\n"), 4096000u);
  EXPECT_EQ(limit("0::/other\n"), UINT64_MAX);
  write("a/b/memory.high", "2048000");
  EXPECT_EQ(limit("0::/a/b\n"), 2048000u);
  write("a/b/memory.high", "8192000");
  EXPECT_EQ(limit("0::/a/b\n"), 4096000u);
}

TEST_F(MemoryLimitTest, in_a_container_the_tree_begins_at_its_own_group) {
  write("memory.max", "123456");
  EXPECT_EQ(limit("0::/\n"), 123456u);
  EXPECT_EQ(limit("0::/system/container-7\n"), 123456u);
}

TEST_F(MemoryLimitTest, version_1_counts_too) {
  write("memory/docker/memory.limit_in_bytes", "777");
  write("memory/memory.limit_in_bytes", "9223372036854771712");
  EXPECT_EQ(limit("4:cpu,memory_like:/docker\n3:memory:/docker\n0::/\n"), 777u);
}

TEST_F(MemoryLimitTest, what_makes_no_sense_limits_nothing) {
  write("memory.max", "-");
  for (const char* groups : {"", "\n", "0", "0:", "::", "no colons at all", "0::relative\n"}) {
    EXPECT_EQ(limit(groups), UINT64_MAX) << groups;
  }
}

TEST(MostWithin, leaves_a_sixteenth_but_at_least_64_mib_and_at_most_half) {
  EXPECT_EQ(most_within(64 * kGiB), 60 * kGiB);
  EXPECT_EQ(most_within(kGiB), 960 * kMiB);
  EXPECT_EQ(most_within(512 * kMiB), 448 * kMiB);
  EXPECT_EQ(most_within(100 * kMiB), 50 * kMiB);
  EXPECT_EQ(most_within(0), 0u);
}

}  // namespace tensord::daemon
