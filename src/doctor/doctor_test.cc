#include "doctor/doctor.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <set>

namespace tensord::doctor {

namespace {

constexpr Effort kQuick{.size_bytes = 16 << 20, .round_count = 1};

std::string told(const std::vector<Check>& checks) {
  std::string out;
  for (const Check& check : checks) {
    EXPECT_EQ(check.verdict == Check::Verdict::good, check.advice.empty()) << check.name;
    if (check.verdict != Check::Verdict::good)
      out += check.name + (check.verdict == Check::Verdict::missing ? ": missing\n" : "\n");
  }
  return out;
}

class DoctorTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_NE(::mkdtemp(folder_.data()), nullptr); }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::string folder_ = "/tmp/tensord-doctor-test-XXXXXX";
};

}  // namespace

TEST_F(DoctorTest, measures_a_folder_and_leaves_nothing_in_it) {
  const auto measured = measure(folder_, kQuick);
  ASSERT_TRUE(measured) << measured.error().message;
  for (const char* name : {"memcpy_1", "memcpy_all", "gather_all", "fresh_4k", "cache_pread"})
    EXPECT_GT(measured->of(name), 0) << name;
  EXPECT_TRUE(std::filesystem::is_empty(folder_));
}

TEST_F(DoctorTest, measures_a_file_and_does_not_write_to_it) {
  const std::string path = folder_ + "/weights";
  std::ofstream(path) << std::string(20 << 20, 'w');
  const auto before = std::filesystem::last_write_time(path);
  ASSERT_TRUE(measure(path, kQuick));
  EXPECT_EQ(std::filesystem::last_write_time(path), before);
  EXPECT_EQ(std::filesystem::file_size(path), 20u << 20);
  std::filesystem::resize_file(path, 100);
  EXPECT_EQ(measure(path, kQuick).error().code, base::Code::invalid_argument);
  EXPECT_EQ(measure(folder_ + "/none", kQuick).error().code, base::Code::not_found);
}

TEST_F(DoctorTest, every_rate_has_a_verdict_and_says_what_to_do_unless_it_is_good) {
  Rates rates;
  rates.bytes_per_s = {{"memcpy_1", 5e9},     {"memcpy_all", 10e9},  {"gather_all", 8e9},
                       {"fresh_4k", 6e9},     {"fresh_huge", 8e9},   {"cache_pread", 5e9},
                       {"cache_stream", 5e9}, {"cache_mapped", 5e9}, {"disk_buffered", 1e9},
                       {"disk_direct", 3e9}};
  EXPECT_EQ(told(judge(rates)), "");
  EXPECT_EQ(judge(rates).size(), rates.bytes_per_s.size());
  rates.bytes_per_s["fresh_4k"] = 1e9;
  rates.bytes_per_s["disk_direct"] = 0.5e9;
  rates.bytes_per_s["fresh_huge"] = 0;
  EXPECT_EQ(told(judge(rates)),
            "fresh memory, 4 KiB pages\nfresh memory, huge pages: missing\ndisk, O_DIRECT\n");
}

TEST(Doctor, looks_at_what_the_system_allows) {
  const std::vector<Check> checks = look_around();
  told(checks);
  std::set<std::string> names;
  for (const Check& check : checks) {
    names.insert(check.name);
    EXPECT_FALSE(check.value.empty()) << check.name;
  }
  EXPECT_EQ(names.size(), checks.size());
  for (const char* name :
       {"io_uring", "huge pages, MADV_COLLAPSE", "huge pages, MFD_HUGETLB", "RLIMIT_MEMLOCK", "RLIMIT_NOFILE",
        "memfd and its seals", "cgroup memory.max", "seccomp", "/dev/shm"})
    EXPECT_TRUE(names.contains(name)) << name;
}

}  // namespace tensord::doctor
