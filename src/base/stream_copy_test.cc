#include "base/stream_copy.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

namespace tensord::base {
namespace {

TEST(StreamCopy, rows_of_any_size_at_any_place_are_copied_and_nothing_else_is_written) {
  if (!can_stream()) GTEST_SKIP() << "this CPU has neither AVX512F nor AVX2";
  constexpr uint64_t kRowCount = 3;
  std::vector<std::byte> source(4096), target(4096);
  for (size_t at = 0; at < source.size(); ++at) source[at] = static_cast<std::byte>(at * 31 + at / 251);
  for (const uint64_t row_bytes : {1, 63, 64, 65, 127, 128, 200, 513}) {
    for (uint64_t offset = 0; offset < 130; offset += 13) {
      const uint64_t pitch = row_bytes + 7;
      std::fill(target.begin(), target.end(), std::byte{0xa5});
      stream_rows({source.data() + 5, target.data() + offset, row_bytes, kRowCount, static_cast<int64_t>(row_bytes + 3),
                   static_cast<int64_t>(pitch)});
      end_streaming();
      std::vector<std::byte> expected(target.size(), std::byte{0xa5});
      for (uint64_t row = 0; row < kRowCount; ++row) {
        std::memcpy(expected.data() + offset + row * pitch, source.data() + 5 + row * (row_bytes + 3), row_bytes);
      }
      EXPECT_EQ(target, expected) << row_bytes << " bytes at " << offset;
    }
  }
}

}  // namespace
}  // namespace tensord::base
