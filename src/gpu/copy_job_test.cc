#include "gpu/copy_job.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "gpu/fake_cuda_testing.h"

namespace tensord::gpu {

namespace {

using base::Code;

constexpr uint64_t kImageBytes = 1000, kTargetBytes = 500;

// One copy within its memory, to be changed.
CopyJob job_of(const DeviceCopy& copy) {
  CopyJob job;
  job.image_bytes = kImageBytes;
  job.source = {{nullptr, kImageBytes, nullptr}};
  job.targets.push_back({.size_bytes = kTargetBytes, .ipc = IpcHandle{}});
  job.copies = {copy};
  return job;
}

TEST(CopyJob, copies_within_their_memory_are_accepted) {
  for (const DeviceCopy& copy : {
           DeviceCopy{.row_bytes = 500},
           DeviceCopy{.source_offset = 999, .target_offset = 499, .row_bytes = 1},
           // Pitches of a single row count for nothing.
           DeviceCopy{.row_bytes = 1, .source_pitch = UINT64_MAX, .target_pitch = 0},
           DeviceCopy{.source_offset = 10, .row_bytes = 10, .row_count = 10, .source_pitch = 108, .target_pitch = 54},
       })
    EXPECT_TRUE(check(job_of(copy))) << copy.source_offset;
}

TEST(CopyJob, copies_that_reach_out_of_memory_or_that_none_can_do_are_refused) {
  constexpr uint64_t kMax = UINT64_MAX;
  const DeviceCopy rows{.row_bytes = 10, .row_count = 10, .source_pitch = 50, .target_pitch = 50};
  const auto with = [&](auto change) {
    DeviceCopy copy = rows;
    change(copy);
    return copy;
  };
  ASSERT_TRUE(check(job_of(rows)));
  const DeviceCopy refused[] = {
      {.row_bytes = 0},
      {.row_bytes = 501},
      {.row_bytes = kMax},
      {.source_offset = 1000, .row_bytes = 1},
      {.source_offset = kMax, .row_bytes = 1},
      {.source_offset = kMax - 9, .row_bytes = 10},
      {.target_offset = 500, .row_bytes = 1},
      {.target_offset = kMax, .row_bytes = 2},
      {.row_bytes = 1, .target = 1},
      {.row_bytes = 1, .target = UINT32_MAX},
      with([](DeviceCopy& copy) { copy.row_count = 0; }),
      with([](DeviceCopy& copy) { copy.row_count = 11; }),
      with([](DeviceCopy& copy) { copy.row_count = kMax; }),
      with([](DeviceCopy& copy) { copy.source_pitch = 9; }),
      with([](DeviceCopy& copy) { copy.target_pitch = 0; }),
      with([](DeviceCopy& copy) { copy.source_pitch = kMax; }),
      with([](DeviceCopy& copy) { copy.target_pitch = kMax / 9 + 1; }),
      with([](DeviceCopy& copy) { copy.source_pitch = 111; }),
      with([](DeviceCopy& copy) { copy.target_pitch = 55; }),
      with([](DeviceCopy& copy) { copy.row_count = 2, copy.source_pitch = kPitchMax + 1; }),
      with([](DeviceCopy& copy) { copy.row_count = kMax, copy.source_pitch = copy.target_pitch = kPitchMax; }),
  };
  for (const DeviceCopy& copy : refused) {
    const Status done = check(job_of(copy));
    ASSERT_FALSE(done) << &copy - refused;
    EXPECT_EQ(done.error().code, Code::invalid_argument);
    EXPECT_NE(done.error().message.find("copy 0 of 1"), std::string::npos) << done.error().message;
  }
}

TEST(CopyJob, targets_larger_than_their_allocations_are_refused) {
  CopyJob job = job_of({.row_bytes = 1});
  job.targets[0] = {.size_bytes = 500};
  EXPECT_FALSE(check(job));
  job.targets[0].allocations.emplace_back(base::Fd(), 499);
  EXPECT_FALSE(check(job));
  job.targets[0].allocations.emplace_back(base::Fd(), 1);
  EXPECT_TRUE(check(job));
}

// A job of random copies within an image of several segments, and two targets.
class RandomJob {
 public:
  explicit RandomJob(uint32_t seed) : dice_(seed) {
    for (int count = pick(1, 4); count > 0; --count) {
      job.source.push_back({nullptr, pick(1, 3) * 1024u, nullptr});
      segment_bytes += job.source.back().size_bytes;
    }
    job.image_bytes = segment_bytes - pick(0, 1000);
    for (int number = 0; number < 2; ++number)
      job.targets.push_back({.size_bytes = pick(2000u, 9000u), .ipc = IpcHandle{}});
    while (job.copies.size() < 20) {
      const DeviceCopy copy = any_copy();
      job.copies.push_back(copy);
      if (!check(job)) job.copies.pop_back();
    }
  }
  CopyJob job;
  uint64_t segment_bytes = 0;

  uint64_t pick(uint64_t least, uint64_t most) { return std::uniform_int_distribution<uint64_t>(least, most)(dice_); }

 private:
  DeviceCopy any_copy() {
    DeviceCopy copy{.source_offset = pick(0, job.image_bytes), .target_offset = pick(0, 4000)};
    copy.row_bytes = pick(0, 3) == 0 ? pick(1, 3000) : pick(1, 40);
    copy.row_count = pick(0, 1) == 0 ? 1 : pick(1, 60);
    copy.source_pitch = copy.row_bytes + (pick(0, 1) == 0 ? 0 : pick(0, 200));
    copy.target_pitch = copy.row_bytes + (pick(0, 1) == 0 ? 0 : pick(0, 200));
    copy.target = static_cast<uint32_t>(pick(0, 1));
    return copy;
  }
  std::mt19937 dice_;
};

TEST(PieceCutter, pieces_do_what_the_copies_say_and_cross_no_part_and_no_segment) {
  for (uint32_t seed = 0; seed < 3000; ++seed) {
    RandomJob random(seed);
    std::vector<std::byte> image(random.segment_bytes);
    for (std::byte& byte : image) byte = static_cast<std::byte>(random.pick(0, 255));
    std::vector<std::vector<std::byte>> wanted, got;
    for (const Target& target : random.job.targets) wanted.emplace_back(target.size_bytes);
    got = wanted;
    copy_naively(random.job.copies, image.data(), wanted);
    const uint64_t part_bytes = random.pick(1, 8) * 256;
    PieceCutter cutter(random.job, part_bytes);
    while (const auto piece = cutter.next()) {
      uint64_t segment_begin = 0;
      for (uint32_t before = 0; before < piece->segment; ++before)
        segment_begin += random.job.source[before].size_bytes;
      ASSERT_EQ(segment_begin + piece->segment_offset, piece->image_offset) << "seed " << seed;
      const uint64_t span = piece->image_end() - piece->image_offset;
      ASSERT_LE(piece->segment_offset + span, random.job.source[piece->segment].size_bytes) << "seed " << seed;
      ASSERT_EQ(piece->segment_offset / part_bytes, (piece->segment_offset + span - 1) / part_bytes) << "seed " << seed;
      const DeviceCopy copy{piece->image_offset, piece->target_offset, piece->row_bytes, piece->row_count,
                            piece->source_pitch, piece->target_pitch,  piece->target};
      copy_naively({copy}, image.data(), got);
    }
    ASSERT_EQ(got, wanted) << "seed " << seed;
  }
}

TEST(PieceCutter, pieces_are_of_bounded_size_and_dense_rows_are_one) {
  CopyJob job;
  job.image_bytes = uint64_t{1} << 40;
  job.source = {{nullptr, job.image_bytes, nullptr}};
  job.targets.push_back({.size_bytes = job.image_bytes, .ipc = IpcHandle{}});
  job.copies = {{.row_bytes = 100 << 20},
                {.row_bytes = 1 << 20, .row_count = 64, .source_pitch = 1 << 20, .target_pitch = 1 << 20},
                {.row_bytes = 1 << 20, .row_count = 64, .source_pitch = 2 << 20, .target_pitch = 1 << 20}};
  ASSERT_TRUE(check(job));
  PieceCutter cutter(job, 64 << 20);
  uint64_t bytes = 0;
  size_t count = 0;
  while (const auto piece = cutter.next()) {
    EXPECT_LE(piece->bytes(), kPieceBytes);
    bytes += piece->bytes();
    ++count;
  }
  EXPECT_EQ(bytes, uint64_t{228} << 20);
  EXPECT_EQ(count, 7u + 4u + 4u);
}

TEST(PieceCutter, no_copies_are_no_pieces) {
  CopyJob job;
  EXPECT_FALSE(PieceCutter(job, 1024).next());
}

}  // namespace

}  // namespace tensord::gpu
