#include <gtest/gtest.h>

#include "base/bytes.h"
#include "base/result.h"

namespace tensord::base {

TEST(Bytes, sizes_are_read_as_powers_of_1024) {
  EXPECT_EQ(parse_bytes("8GiB").value(), 8 * kGiB);
  EXPECT_EQ(parse_bytes("1.5 MiB").value(), 3 * kMiB / 2);
  EXPECT_EQ(parse_bytes("2g").value(), 2 * kGiB);
  EXPECT_EQ(parse_bytes("1000").value(), 1000u);
}

TEST(Bytes, nonsense_sizes_are_refused_with_an_example) {
  for (const char* text : {"", "x", "-1", "8Q", "8GiBs", "1e99", "nan"}) {
    const auto size = parse_bytes(text);
    ASSERT_FALSE(size) << text;
    EXPECT_EQ(size.error().code, Code::invalid_argument);
    EXPECT_NE(size.error().message.find("8GiB"), std::string::npos);
  }
}

TEST(Bytes, sizes_are_written_with_two_decimals) {
  EXPECT_EQ(human_bytes(512), "512 B");
  EXPECT_EQ(human_bytes(3 * kMiB / 2), "1.50 MiB");
}

TEST(Result, errno_becomes_a_code_that_callers_can_act_on) {
  EXPECT_EQ(errno_error("open x", ENOENT).code, Code::not_found);
  EXPECT_EQ(errno_error("open x", ENOSPC).code, Code::exhausted);
  EXPECT_EQ(errno_error("open x", EACCES).code, Code::denied);
  EXPECT_EQ(errno_error("open x", EROFS).code, Code::denied);
  for (const int value : {ELOOP, ENAMETOOLONG, ENXIO, EISDIR}) {
    EXPECT_EQ(errno_error("open x", value).code, Code::invalid_argument);
  }
}

TEST(Result, a_code_that_came_as_an_unknown_number_is_internal) {
  EXPECT_EQ(code_from(1), Code::not_found);
  EXPECT_EQ(code_from(10), Code::internal);
  for (const uint32_t number : {0u, 11u, 257u}) EXPECT_EQ(code_from(number), Code::internal);
}

}  // namespace tensord::base
