#include "memory/segment_pool.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <fstream>
#include <numeric>

#include "base/bytes.h"

namespace tensord::memory {

using base::kGiB;
using base::kKiB;
using base::kMiB;

TEST(SegmentSizes, are_one_segment_for_a_small_image_and_the_binary_digits_of_a_large_one) {
  using Sizes = std::vector<uint64_t>;
  EXPECT_EQ(segment_sizes(0), Sizes{});
  EXPECT_EQ(segment_sizes(1), Sizes{4 * kKiB});
  EXPECT_EQ(segment_sizes(10'000'000), Sizes{9984 * kKiB});
  EXPECT_EQ(segment_sizes(16 * kMiB), Sizes{16 * kMiB});
  EXPECT_EQ(segment_sizes(20 * kMiB), (Sizes{16 * kMiB, 4 * kMiB}));
  EXPECT_EQ(segment_sizes(kGiB + 1), (Sizes{512 * kMiB, 512 * kMiB, 4 * kKiB}));
}

TEST(SegmentSizes, waste_little_and_fall_in_size) {
  for (uint64_t bytes = 1; bytes < 2 * kGiB; bytes += bytes / 97 + 12345) {
    const auto sizes = segment_sizes(bytes);
    const uint64_t sum = std::accumulate(sizes.begin(), sizes.end(), uint64_t{0});
    EXPECT_GE(sum, bytes);
    EXPECT_LE(sum - bytes, std::max(bytes / 32, kSegmentBytesMin)) << bytes;
    EXPECT_TRUE(std::is_sorted(sizes.rbegin(), sizes.rend()));
  }
}

TEST(SegmentPool, a_run_is_one_stretch_of_addresses) {
  SegmentPool pool(64 * kMiB);
  SegmentRun run = pool.allocate(22 * kMiB, 1).value();
  ASSERT_EQ(run.segments.size(), 3u);
  for (size_t at = 1; at < run.segments.size(); ++at) {
    EXPECT_EQ(run.segments[at].data(), run.segments[at - 1].data() + run.segments[at - 1].size_bytes());
  }
  EXPECT_EQ(pool.in_use_bytes(), run.size_bytes());
  pool.free(std::move(run));
}

TEST(SegmentPool, a_recycled_segment_keeps_its_pages_for_its_owner_only) {
  SegmentPool pool(64 * kMiB);
  SegmentRun run = pool.allocate(8 * kMiB, 1).value();
  run.data()[5] = std::byte{42};
  pool.free(std::move(run));
  EXPECT_EQ(pool.kept_bytes(), 8 * kMiB);
  SegmentRun of_another = pool.allocate(8 * kMiB, 2).value();
  EXPECT_EQ(of_another.data()[5], std::byte{0});
  SegmentRun again = pool.allocate(8 * kMiB, 1).value();
  EXPECT_EQ(again.data()[5], std::byte{42});
  EXPECT_EQ(pool.kept_bytes(), 0u);
}

TEST(SegmentPool, in_use_and_kept_together_never_exceed_the_limit) {
  SegmentPool pool(16 * kMiB);
  pool.free(pool.allocate(16 * kMiB, 1).value());
  EXPECT_EQ(pool.kept_bytes(), 16 * kMiB);
  SegmentRun run = pool.allocate(4 * kMiB, 1).value();
  EXPECT_EQ(pool.trim().size(), 1u);
  EXPECT_LE(pool.in_use_bytes() + pool.kept_bytes(), 16 * kMiB);
  const auto refused = pool.allocate(13 * kMiB, 1);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, base::Code::exhausted);
  EXPECT_EQ(pool.in_use_bytes(), 4 * kMiB);
}

TEST(SegmentPool, what_is_kept_goes_out_with_an_allocation_that_needs_its_room) {
  SegmentPool pool(16 * kMiB);
  pool.free(pool.allocate(8 * kMiB, 1).value());
  const SegmentRun large = pool.allocate(12 * kMiB, 2).value();
  const std::vector<Segment> surplus = pool.trim();
  ASSERT_EQ(surplus.size(), 1u);
  EXPECT_EQ(surplus[0].size_bytes(), 8 * kMiB);
  EXPECT_EQ(pool.kept_bytes(), 0u);
}

TEST(SegmentPool, a_lower_limit_leaves_what_is_in_use_and_takes_the_oldest_that_is_kept) {
  SegmentPool pool(16 * kMiB);
  SegmentRun used = pool.allocate(8 * kMiB, 1).value();
  SegmentRun first = pool.allocate(2 * kMiB, 1).value();
  pool.free(pool.allocate(kMiB, 1).value());
  pool.free(std::move(first));
  pool.set_limit(10 * kMiB);
  const std::vector<Segment> gone = pool.trim();
  ASSERT_EQ(gone.size(), 1u);
  EXPECT_EQ(gone[0].size_bytes(), kMiB);
  pool.set_limit(4 * kMiB);
  EXPECT_EQ(pool.trim().size(), 1u);
  EXPECT_EQ(pool.in_use_bytes(), 8 * kMiB);
  EXPECT_EQ(pool.free_bytes(), 0u);
  EXPECT_FALSE(pool.allocate(1, 1));
  pool.free(std::move(used));
  EXPECT_EQ(pool.trim().size(), 1u);
  EXPECT_EQ(pool.kept_bytes(), 0u);
}

TEST(SegmentPool, kept_segments_can_be_trimmed_by_count) {
  SegmentPool pool(16 * kMiB);
  std::vector<SegmentRun> runs;
  for (int at = 0; at < 4; ++at) runs.push_back(pool.allocate(kMiB, 1).value());
  for (SegmentRun& run : runs) pool.free(std::move(run));
  EXPECT_EQ(pool.trim(3).size(), 1u);
  EXPECT_EQ(pool.kept_bytes(), 3 * kMiB);
}

namespace {
// The limit of this process on one resource, lowered while it lives.
class Lowered {
 public:
  Lowered(__rlimit_resource resource, rlim_t most) : resource_(resource) {
    ::getrlimit(resource, &before_);
    const rlimit lowered{most, before_.rlim_max};
    ::setrlimit(resource, &lowered);
  }
  ~Lowered() { ::setrlimit(resource_, &before_); }

 private:
  const __rlimit_resource resource_;
  rlimit before_{};
};

// A pool of which 22 MiB are asked for, three segments, while the system refuses.
void expect_clean_refusal(SegmentPool& pool, __rlimit_resource resource, rlim_t most) {
  const auto in_use_bytes = pool.in_use_bytes();
  {
    const Lowered lowered(resource, most);
    const auto refused = pool.allocate(22 * kMiB, 1);
    ASSERT_FALSE(refused) << most;
    EXPECT_EQ(refused.error().code, base::Code::exhausted) << refused.error().message;
  }
  EXPECT_EQ(pool.in_use_bytes(), in_use_bytes);
  EXPECT_LE(pool.in_use_bytes() + pool.kept_bytes(), pool.limit_bytes());
  auto again = pool.allocate(22 * kMiB, 1);
  ASSERT_TRUE(again) << again.error().message;
  EXPECT_EQ(again->segments.size(), 3u) << "as if nothing had been refused";
  pool.free(std::move(*again));
}
}  // namespace

TEST(SegmentPool, a_system_that_refuses_any_part_of_a_request_spoils_no_later_one) {
  const auto next_fd = static_cast<rlim_t>(base::duplicate(STDIN_FILENO).value().get());
  for (rlim_t left = 0; left < 3; ++left) {
    SegmentPool pool(64 * kMiB);
    const SegmentRun used = pool.allocate(kMiB, 1).value();
    expect_clean_refusal(pool, RLIMIT_NOFILE, next_fd + 1 + left);
  }
  // Of addresses there are too few for the first segment, or for all of them in one stretch.
  for (const uint64_t left_mib : {4, 34}) {
    SegmentPool pool(64 * kMiB);
    uint64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    expect_clean_refusal(pool, RLIMIT_AS, pages * 4096 + left_mib * kMiB);
  }
}

TEST(SegmentPool, a_claim_counts_until_it_is_settled) {
  SegmentPool pool(16 * kMiB);
  ASSERT_TRUE(pool.claim(8 * kMiB));
  EXPECT_FALSE(pool.claim(16 * kMiB));
  EXPECT_FALSE(pool.allocate(16 * kMiB, 1));
  pool.settle_claim(8 * kMiB, make_segment(8 * kMiB, 1).value());
  EXPECT_EQ(pool.in_use_bytes(), 0u);
  EXPECT_EQ(pool.kept_bytes(), 8 * kMiB);
  EXPECT_TRUE(pool.allocate(16 * kMiB, 1));
}

TEST(SegmentPool, nobody_else_can_write_resize_or_unseal_a_segment) {
  const Segment segment = make_segment(kMiB, 1).value();
  EXPECT_EQ(::mmap(nullptr, kMiB, PROT_READ | PROT_WRITE, MAP_SHARED, segment.fd(), 0), MAP_FAILED);
  EXPECT_LT(::ftruncate(segment.fd(), 0), 0);
  EXPECT_LT(::pwrite(segment.fd(), "x", 1, 0), 0);
  EXPECT_LT(::fcntl(segment.fd(), F_ADD_SEALS, F_SEAL_WRITE), 0);
  void* own_copy = ::mmap(nullptr, kMiB, PROT_READ | PROT_WRITE, MAP_PRIVATE, segment.fd(), 0);
  ASSERT_NE(own_copy, MAP_FAILED);
  static_cast<char*>(own_copy)[0] = 'x';
  EXPECT_EQ(segment.data()[0], std::byte{0});
  ::munmap(own_copy, kMiB);
}

TEST(SegmentPool, adopted_segments_hold_what_they_held_and_are_not_used_again) {
  const Segment before = make_segment(4 * kMiB, 1).value();
  before.data()[5] = std::byte{7};
  SegmentPool pool(4 * kMiB);
  std::vector<std::pair<base::Fd, uint64_t>> files;
  files.emplace_back(base::duplicate(before.fd()).value(), 4 * kMiB);
  SegmentRun run = adopt_segments(std::move(files)).value();
  pool.adopt(run);
  EXPECT_EQ(run.data()[5], std::byte{7});
  EXPECT_EQ(pool.in_use_bytes(), 4 * kMiB);
  EXPECT_FALSE(pool.allocate(4 * kMiB, 1));
  pool.free(std::move(run));
  EXPECT_EQ(pool.in_use_bytes(), 0u);
  EXPECT_EQ(pool.trim().size(), 1u);
  EXPECT_EQ(pool.kept_bytes(), 0u);
  EXPECT_EQ(pool.allocate(4 * kMiB, 1).value().data()[5], std::byte{0});
}

TEST(SegmentPool, what_could_change_or_shrink_is_not_adopted) {
  const Segment sealed = make_segment(kMiB, 1).value();
  const base::Fd open(::memfd_create("open", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(::ftruncate(open.get(), kMiB), 0);
  for (const auto& [fd, size_bytes] : {std::pair(open.get(), kMiB), std::pair(sealed.fd(), 2 * kMiB),
                                       std::pair(sealed.fd(), uint64_t{0}), std::pair(STDIN_FILENO, kMiB)}) {
    std::vector<std::pair<base::Fd, uint64_t>> files;
    files.emplace_back(base::duplicate(fd).value(), size_bytes);
    EXPECT_EQ(adopt_segments(std::move(files)).error().code, base::Code::corrupt);
  }
}

}  // namespace tensord::memory
