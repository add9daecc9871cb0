#include "memory/fresh_pages.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <thread>

#include "base/bytes.h"

namespace tensord::memory {
namespace {

using base::kMiB;

// Bytes of huge pages of shared memory that are mapped as such in this process.
uint64_t huge_mapped_bytes() {
  std::ifstream file("/proc/self/smaps_rollup");
  std::string name;
  for (uint64_t kib = 0; file >> name;) {
    if (name == "ShmemPmdMapped:" && file >> kib) return kib << 10;
  }
  return 0;
}

SegmentRun fresh_run(SegmentPool& pool, uint64_t bytes) { return std::move(pool.allocate(bytes, 1).value()); }

TEST(FreshPages, become_huge_where_the_system_allows_it_else_it_says_why) {
  SegmentPool pool(64 * kMiB);
  const SegmentRun run = fresh_run(pool, 18 * kMiB);
  FreshPages pages(run.segments, run.size_bytes(), HugePages::wanted);
  const uint64_t before_bytes = huge_mapped_bytes();
  pages.prepare(0, run.size_bytes());
  if (!pages.problem().empty()) GTEST_SKIP() << pages.problem();
  std::memset(run.data(), 1, run.size_bytes());
  EXPECT_GE(huge_mapped_bytes() - before_bytes, 16 * kMiB);
}

TEST(FreshPages, are_left_alone_when_huge_ones_are_unwanted_or_the_memory_was_touched) {
  SegmentPool pool(64 * kMiB);
  SegmentRun run = fresh_run(pool, 16 * kMiB);
  const uint64_t before_bytes = huge_mapped_bytes();
  FreshPages(run.segments, run.size_bytes(), HugePages::unwanted).prepare(0, run.size_bytes());
  for (Segment& segment : run.segments) segment.set_touched(segment.size_bytes());
  FreshPages pages(run.segments, run.size_bytes(), HugePages::wanted);
  pages.prepare(0, run.size_bytes());
  std::memset(run.data(), 1, run.size_bytes());
  EXPECT_EQ(huge_mapped_bytes(), before_bytes);
  EXPECT_EQ(pages.problem(), "");
}

TEST(FreshPages, nothing_beyond_the_image_gets_a_page_and_a_segment_is_fresh_behind_what_was_touched) {
  SegmentPool pool(64 * kMiB);
  SegmentRun run = fresh_run(pool, 16 * kMiB);
  FreshPages pages(run.segments, 7 * kMiB, HugePages::wanted);
  const uint64_t before_bytes = huge_mapped_bytes();
  pages.prepare(0, 7 * kMiB);
  if (!pages.problem().empty()) GTEST_SKIP() << pages.problem();
  EXPECT_EQ(huge_mapped_bytes() - before_bytes, 6 * kMiB);
  run.segments.front().set_touched(6 * kMiB);
  FreshPages(run.segments, 16 * kMiB, HugePages::wanted).prepare(0, 16 * kMiB);
  EXPECT_EQ(huge_mapped_bytes() - before_bytes, 16 * kMiB);
}

TEST(FreshPages, bytes_written_beside_and_meanwhile_stay) {
  SegmentPool pool(64 * kMiB);
  const SegmentRun run = fresh_run(pool, 16 * kMiB + 300'000);
  FreshPages pages(run.segments, run.size_bytes(), HugePages::wanted);
  constexpr uint64_t kPieceBytes = 700'001;  // two threads meet in most stretches
  std::vector<std::thread> threads;
  std::atomic<uint64_t> next{0};
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&] {
      for (uint64_t at = next.fetch_add(kPieceBytes); at < run.size_bytes(); at = next.fetch_add(kPieceBytes)) {
        const uint64_t size_bytes = std::min(kPieceBytes, run.size_bytes() - at);
        pages.prepare(at, size_bytes);
        std::memset(run.data() + at, static_cast<int>(at / kPieceBytes + 1), size_bytes);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (uint64_t at = 0; at < run.size_bytes(); ++at) {
    ASSERT_EQ(run.data()[at], static_cast<std::byte>(at / kPieceBytes + 1)) << at;
  }
}

}  // namespace
}  // namespace tensord::memory
