#include "storage/memory_source_testing.h"

#include <gtest/gtest.h>

#include "storage/source_testing.h"

namespace tensord::storage {
namespace {

using base::Code;
using Bytes = std::vector<std::byte>;

TEST(MemorySource, a_fault_strikes_the_read_that_touches_its_byte_once) {
  auto source = make_memory_source(
      {.files = {sample_bytes(100)},
       .faults = {{.file = 0, .offset = 50, .error = {Code::unavailable, "read file 0 at 50: torn"}}}});
  Bytes read(100);
  EXPECT_TRUE(read_now(*source, 0, 0, std::span(read).first(50)));
  EXPECT_TRUE(read_now(*source, 0, 51, std::span(read).first(49)));
  EXPECT_EQ(read_now(*source, 0, 0, read).error().message, "read file 0 at 50: torn");
  EXPECT_TRUE(read_now(*source, 0, 0, read));
  EXPECT_EQ(source->counters().read_count, 3u);
}

TEST(MemorySource, a_fault_that_stays_strikes_every_time) {
  auto source =
      make_memory_source({.files = {Bytes(10), Bytes(10)},
                          .faults = {{.file = 1, .offset = 9, .error = {Code::corrupt, "bad"}, .always = true}}});
  Bytes read(10);
  EXPECT_TRUE(read_now(*source, 0, 0, read));
  for (int i = 0; i < 3; ++i) EXPECT_EQ(read_now(*source, 1, 0, read).error().code, Code::corrupt);
}

TEST(MemorySource, held_reads_are_released_oldest_first) {
  auto source = make_memory_source({.files = {sample_bytes(3)}, .hold = true});
  Bytes read(3);
  std::string order;
  for (const size_t i : {0, 1, 2}) {
    source->read({0, i, std::span(read).subspan(i, 1), [&order, i](Status status, ReadTiming) {
                    order += std::to_string(i) + (status ? " " : " refused ");
                  }});
  }
  EXPECT_EQ(source->held_count(), 3u);
  source->release_reads(2);
  EXPECT_EQ(order, "0 1 ");
  source->cancel();
  EXPECT_EQ(order, "0 1 2 refused ");
  EXPECT_EQ(source->held_count(), 0u);
}

TEST(MemorySource, a_change_can_be_scripted) {
  EXPECT_EQ(make_memory_source({.changed = true})->check_unchanged(0).error().code, Code::changed);
}

}  // namespace
}  // namespace tensord::storage
