#include "doctor/doctor.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

namespace tensord::doctor {

namespace {

constexpr Effort kQuick{.size_bytes = 16 << 20, .round_count = 1};

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

}  // namespace tensord::doctor
