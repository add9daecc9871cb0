#include "engine/eviction.h"

#include <gtest/gtest.h>

namespace tensord::engine {

namespace {
using Victims = std::vector<uint64_t>;

std::vector<EvictionCandidate> three() {
  return {{.replica = 1, .memory_bytes = 10, .last_used_ns = 300},
          {.replica = 2, .memory_bytes = 20, .last_used_ns = 100},
          {.replica = 3, .memory_bytes = 30, .last_used_ns = 200}};
}
}  // namespace

TEST(Eviction, takes_the_least_recently_used_first_and_no_more_than_needed) {
  EXPECT_EQ(choose_victims(three(), 0, 0), Victims{});
  EXPECT_EQ(choose_victims(three(), 1, 0), Victims{2});
  EXPECT_EQ(choose_victims(three(), 21, 0), (Victims{2, 3}));
  EXPECT_EQ(choose_victims(three(), 60, 0), (Victims{2, 3, 1}));
}

TEST(Eviction, descriptors_are_needed_like_memory) {
  auto replicas = three();
  for (auto& replica : replicas) replica.descriptor_count = 3;
  EXPECT_EQ(choose_victims(replicas, 1, 4), (Victims{2, 3}));
  EXPECT_EQ(choose_victims(replicas, 60, 1), (Victims{2, 3, 1}));
  EXPECT_EQ(choose_victims(replicas, 0, 10), std::nullopt);
}

TEST(Eviction, never_takes_what_somebody_holds) {
  auto replicas = three();
  replicas[1].held = true;
  EXPECT_EQ(choose_victims(replicas, 35, 0), (Victims{3, 1}));
  EXPECT_EQ(choose_victims(replicas, 41, 0), std::nullopt);
}

TEST(Eviction, takes_what_there_is_where_that_is_enough) {
  auto replicas = three();
  EXPECT_EQ(choose_as_many(replicas, 1000), (Victims{2, 3, 1}));
  EXPECT_EQ(choose_as_many(replicas, 21), (Victims{2, 3}));
  EXPECT_EQ(choose_as_many(replicas, 0), Victims{});
  for (auto& replica : replicas) replica.held = true;
  EXPECT_EQ(choose_as_many(replicas, 21), Victims{});
}

}  // namespace tensord::engine
