#include "memory/copy.h"

#include <gtest/gtest.h>
#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <thread>

#include "tensor/plan_testing.h"
#include "tensor/plan_transform_testing.h"

namespace tensord::memory {
namespace {

using base::Code;
using base::fail;
using base::TargetState;
using tensor::Copy2D;
using tensor::CopyPlan;
using tensor::parse_plan;

using Bytes = std::vector<std::byte>;
using CopySource = std::span<const std::byte>;
using CopyTarget = std::span<std::byte>;

constexpr std::byte kUntouched{0xEE};

// Bytes that are unlike their neighbours, and unlike those of another seed.
Bytes pattern(uint64_t size_bytes, uint64_t seed = 1) {
  Bytes bytes(size_bytes);
  uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
  for (std::byte& byte : bytes) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    byte = static_cast<std::byte>(state >> 56);
  }
  return bytes;
}

Bytes counting(uint64_t size_bytes) {
  Bytes bytes(size_bytes);
  for (uint64_t at = 0; at < size_bytes; ++at) bytes[at] = static_cast<std::byte>(at);
  return bytes;
}

Copy2D strided(uint64_t source_offset, int64_t source_pitch, uint64_t row_bytes, uint64_t row_count) {
  Copy2D record;
  record.source_offset = source_offset;
  record.source_pitch = source_pitch;
  record.row_bytes = row_bytes;
  record.row_count = row_count;
  record.target_pitch = static_cast<int64_t>(row_bytes);
  return record;
}

// Byte by byte, for plans without casts.
void naive(const CopyPlan& plan, CopySource source, CopyTarget target) {
  for (const Copy2D& record : plan.records) {
    if (record.is_empty()) continue;
    for (uint64_t outer = 0; outer < record.outer_iterations(); ++outer) {
      uint64_t source_outer = record.source_offset;
      uint64_t target_outer = record.target_offset;
      uint64_t left = outer;
      for (size_t at = 0; at < record.outer_count; ++at) {
        const uint64_t index = left % record.outer[at].count;
        left /= record.outer[at].count;
        source_outer += index * static_cast<uint64_t>(record.outer[at].source_pitch);
        target_outer += index * static_cast<uint64_t>(record.outer[at].target_pitch);
      }
      for (uint64_t row = 0; row < record.row_count; ++row) {
        for (uint64_t byte = 0; byte < record.row_bytes; ++byte) {
          const uint64_t to = target_outer + row * static_cast<uint64_t>(record.target_pitch) + byte;
          const uint64_t from = source_outer + row * static_cast<uint64_t>(record.source_pitch) + byte;
          target[to] = source[from];
        }
      }
    }
  }
}

// The plan is good, and writes every byte of its target.
Status check_whole(const CopyPlan& plan, CopySource source, CopyTarget target) {
  TRY(check_plan(plan, source.size(), target.size()));
  return check_complete(plan, target.size());
}

// Runs a checked plan with one and with several threads, in large and in tiny tasks, and compares all bytes.
void expect_copies(const CopyPlan& plan, const Bytes& source, uint64_t target_bytes) {
  Bytes expected(target_bytes, kUntouched), got(target_bytes);
  const auto checked = check_plan(plan, source.size(), target_bytes);
  ASSERT_TRUE(checked) << checked.error().message;
  naive(plan, source, expected);
  for (const int thread_count : {1, 3}) {
    for (const uint64_t task_bytes_max : {kTaskBytes, uint64_t{1000}}) {
      std::fill(got.begin(), got.end(), kUntouched);
      CopyOptions options;
      options.thread_count = thread_count;
      options.task_bytes_max = task_bytes_max;
      const auto report = execute(plan, source, got, options);
      ASSERT_TRUE(report) << report.error().message;
      EXPECT_EQ(report->target_bytes, plan.target_bytes());
      ASSERT_TRUE(got == expected) << thread_count << " threads, tasks of " << task_bytes_max << "\n" << to_text(plan);
    }
  }
}

TEST(Copy, pieces_end_up_where_the_plan_says) {
  const CopyPlan plan = parse_plan(
      "4 -> 0  1 row x 4 B\n"
      "16 -> 4  1 row x 4 B\n"
      "24 -> 12  1 row x 4 B\n"
      "0 -> 8  1 row x 4 B\n");
  const Bytes source = counting(32);
  Bytes target(16, kUntouched);
  const CopySource sources = source;
  const CopyTarget targets = target;
  ASSERT_TRUE(execute(plan, sources, targets, {}));
  const uint8_t expected[16] = {4, 5, 6, 7, 16, 17, 18, 19, 0, 1, 2, 3, 24, 25, 26, 27};
  EXPECT_EQ(std::memcmp(target.data(), expected, 16), 0);

  Bytes part(8, kUntouched);
  const CopyTarget parts = part;
  ASSERT_TRUE(execute(window(plan, 2, 8), sources, parts, {}));
  EXPECT_EQ(std::memcmp(part.data(), expected + 2, 8), 0);
}

TEST(Copy, an_empty_plan_copies_nothing_and_succeeds) {
  const auto report = execute({}, {}, {}, {});
  ASSERT_TRUE(report);
  EXPECT_EQ(report->target_bytes, 0u);
  EXPECT_EQ(report->task_count, 0u);
}

TEST(Copy, no_thread_count_is_one_a_core) {
  const Bytes source = pattern(16 << 20);
  Bytes target(16 << 20, kUntouched);
  const CopySource sources = source;
  const CopyTarget targets = target;
  const CopyPlan plan{{strided(0, 0, 16 << 20, 1)}};
  const auto report = execute(plan, sources, targets, {.thread_count = 0});
  ASSERT_TRUE(report);
  EXPECT_GE(report->thread_count, 1u);
  EXPECT_TRUE(source == target);
}

TEST(Copy, bytes_are_copied_to_several_places) {
  expect_copies(parse_plan("0 -> 0  1 row x 4096 B\n0 -> 4104  1 row x 4096 B\n"), {pattern(4096)}, {8200});
}

TEST(Copy, gaps_between_records_stay_untouched) {
  expect_copies(parse_plan("0 -> 0  1 row x 4096 B\n8192 -> 8192  1 row x 4096 B\n16384 -> 16384  1 row x 8192 B\n"),
                {pattern(32768)}, {32768});
}

TEST(Copy, rows_of_every_size_around_the_thresholds) {
  for (const uint64_t row_bytes :
       {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 511, 512, 513, 4095, 4096, 4097}) {
    for (const uint64_t row_count : {1, 7, 8, 9, 127, 128, 129}) {
      for (const uint64_t gap : {uint64_t{0}, uint64_t{1}, row_bytes, 7 * row_bytes, 7 * row_bytes + 1}) {
        const uint64_t pitch = row_bytes + gap;
        Copy2D record = strided(3, static_cast<int64_t>(pitch), row_bytes, row_count);
        expect_copies({{record}}, {pattern(3 + pitch * row_count)}, {row_bytes * row_count});
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Copy, rows_far_apart) {
  for (const uint64_t row_bytes : {1, 64, 513, 1280, 4096}) {
    for (const uint64_t factor : {2, 8, 16, 128}) {
      for (const uint64_t row_count : {1, 9, 40}) {
        const auto pitch = static_cast<int64_t>(row_bytes * factor);
        expect_copies({{strided(5, pitch, row_bytes, row_count)}}, {pattern(5 + row_bytes * factor * row_count)},
                      {row_bytes * row_count});
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Copy, rows_that_end_at_any_byte_of_a_task) {
  for (const uint64_t size_bytes :
       {(256 << 10) - 1, 256 << 10, (256 << 10) + 1, (4 << 20) - 1, 4 << 20, (4 << 20) + 1}) {
    expect_copies({{strided(0, 0, size_bytes, 1)}}, {pattern(size_bytes)}, {size_bytes});
    expect_copies({{strided(0, static_cast<int64_t>(size_bytes + 5), size_bytes, 2)}}, {pattern(size_bytes * 2 + 5)},
                  {size_bytes * 2});
  }
  for (const uint64_t row_count : {12287, 12288, 12289}) {
    expect_copies({{strided(0, 70, 35, row_count)}}, {pattern(row_count * 70)}, {row_count * 35});
  }
}

TEST(Copy, matrices_of_a_real_model_cut_by_columns) {
  struct Cut {
    uint64_t pitch, row_bytes;
  };
  for (const Cut cut : {Cut{34816, 17408}, {10240, 5120}, {10240, 2560}, {10240, 1280}, {34816, 4352}}) {
    for (const uint64_t row_count : {1, 300}) {
      expect_copies({{strided(cut.row_bytes, static_cast<int64_t>(cut.pitch), cut.row_bytes, row_count)}},
                    {pattern(cut.pitch * row_count + cut.row_bytes)}, {cut.row_bytes * row_count});
    }
  }
}

TEST(Copy, broadcast_overlapping_and_reversed_source_rows) {
  const Bytes sources = pattern(100000);
  expect_copies({{strided(10, 0, 100, 50)}}, sources, {5000});
  expect_copies({{strided(10, 1, 100, 50)}}, sources, {5000});
  expect_copies({{strided(10, 99, 100, 50)}}, sources, {5000});
  expect_copies({{strided(90000, -150, 100, 50)}}, sources, {5000});
  expect_copies({{strided(90000, -1, 1, 5000)}}, sources, {5000});
}

TEST(Copy, every_misalignment_of_source_and_target) {
  for (const uint64_t source_shift : {0, 1, 2, 4, 8, 31}) {
    for (const uint64_t target_shift : {0, 1, 2, 4, 8, 31}) {
      for (const uint64_t row_bytes : {2, 8, 64, 1000}) {
        Copy2D record = strided(source_shift, 4097, row_bytes, 20);
        record.target_offset = target_shift;
        expect_copies({{record}}, {pattern(4097 * 20 + 31)}, {row_bytes * 20 + 64});
      }
    }
  }
}

TEST(Copy, a_mixed_plan) {
  expect_copies(parse_plan("0 -> 0  1 row x 100000 B\n"
                           "100000 pitch 4096 -> 100000 pitch 2048  1000 rows x 2048 B\n"
                           "5242887 pitch 300 -> 2148007 pitch 100  5000 rows x 100 B  x 2 pitch 3 -> 600000\n"
                           "5242880 -> 2148000  1 row x 7 B\n"
                           "5242885 pitch 0 -> 2648007 pitch 10  100 rows x 10 B\n"),
                {pattern(7 << 20)}, {4 << 20});
}

TEST(Copy, transposes_of_every_element_size) {
  for (const uint64_t element : {1, 2, 3, 4, 8, 12, 16, 33, 64}) {
    for (const auto& [height, width] : {std::pair<uint64_t, uint64_t>{1, 5}, {70, 130}, {257, 3}, {200, 400}}) {
      tensor::Wanted wanted;
      const auto step = static_cast<int64_t>(element);
      wanted.from = {5, {width, height}, {step, static_cast<int64_t>(width) * step}, static_cast<uint32_t>(element)};
      wanted.to = {3, {width, height}, {static_cast<int64_t>(height) * step, step}, static_cast<uint32_t>(element)};
      const auto plan = tensor::compile({&wanted, 1});
      ASSERT_TRUE(plan);
      expect_copies(*plan, {pattern(5 + height * width * element)}, {3 + height * width * element});
      if (HasFatalFailure()) return;
    }
  }
}

// Memory that ends, and begins, where access faults.
class Guarded {
 public:
  explicit Guarded(uint64_t size_bytes) : size_bytes_(size_bytes) {
    const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    inside_ = (size_bytes + page - 1) / page * page;
    all_ = inside_ + 2 * page;
    map_ = static_cast<std::byte*>(mmap(nullptr, all_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    EXPECT_EQ(mprotect(map_ + page, inside_, PROT_READ | PROT_WRITE), 0);
    first_ = map_ + page;
  }
  ~Guarded() { munmap(map_, all_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  std::byte* at_begin() const { return first_; }
  std::byte* at_end() const { return first_ + inside_ - size_bytes_; }

 private:
  uint64_t size_bytes_, inside_, all_;
  std::byte* map_;
  std::byte* first_;
};

TEST(Copy, nothing_is_touched_before_or_behind_the_rows) {
  for (const uint64_t row_bytes : {1, 2, 3, 5, 7, 8, 12, 24, 48, 63, 64, 65, 100, 4096}) {
    for (const uint64_t row_count : {1, 2, 127, 128}) {
      for (const bool is_transposed : {false, true}) {
        const uint64_t pitch = 2 * row_bytes;
        const uint64_t source_bytes = (row_count - 1) * pitch + row_bytes;  // the last row is not followed by its gap
        Copy2D record = strided(0, static_cast<int64_t>(pitch), row_bytes, row_count);
        if (is_transposed) {
          record = strided(0, static_cast<int64_t>(row_bytes * 4), row_bytes, row_count);
          record.outer_count = 1;
          record.outer[0] = {4, static_cast<int64_t>(row_bytes), static_cast<int64_t>(row_bytes * row_count)};
        }
        const uint64_t target_bytes = record.target_bytes();
        const uint64_t reads = is_transposed ? target_bytes : source_bytes;
        const Guarded source(reads), target(target_bytes);
        const Bytes bytes = pattern(reads);
        Bytes expected(target_bytes);
        const CopySource plain = bytes;
        const CopyTarget plain_target = expected;
        naive({{record}}, plain, plain_target);
        for (const bool is_at_end : {false, true}) {
          std::byte* from = is_at_end ? source.at_end() : source.at_begin();
          std::byte* to = is_at_end ? target.at_end() : target.at_begin();
          std::memcpy(from, bytes.data(), reads);
          const CopySource sources = {from, reads};
          const CopyTarget targets = {to, target_bytes};
          ASSERT_TRUE(check_whole({{record}}, sources, targets));
          ASSERT_TRUE(execute({{record}}, sources, targets, {}));
          ASSERT_EQ(std::memcmp(to, expected.data(), target_bytes), 0);
        }
      }
    }
  }
}

// Address space without memory until it is touched.
class Sparse {
 public:
  explicit Sparse(uint64_t size_bytes) : size_bytes_(size_bytes) {
    void* map = mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    EXPECT_NE(map, MAP_FAILED);
    data_ = static_cast<std::byte*>(map);
  }
  ~Sparse() { munmap(data_, size_bytes_); }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;
  std::byte* data() const { return data_; }

 private:
  uint64_t size_bytes_;
  std::byte* data_;
};

TEST(Copy, rows_larger_than_any_task) {
  constexpr uint64_t kRow = 100 << 20;
  const Sparse source(5 * kRow), target(3 * kRow);
  for (uint64_t at = 0; at < 5 * kRow; at += 4093 * 64) source.data()[at] = static_cast<std::byte>(at / 4093);
  const CopySource sources = {source.data(), 5 * kRow};
  const CopyTarget targets = {target.data(), 3 * kRow};
  const CopyPlan plan{{strided(0, 2 * kRow, kRow, 3)}};
  ASSERT_TRUE(check_whole(plan, sources, targets));
  const auto report = execute(plan, sources, targets, {.thread_count = 2});
  ASSERT_TRUE(report);
  EXPECT_EQ(report->task_count, 75u);  // 25 of 4 MiB a row
  for (uint64_t row = 0; row < 3; ++row) {
    EXPECT_EQ(std::memcmp(target.data() + row * kRow, source.data() + row * 2 * kRow, kRow), 0) << row;
  }
}

TEST(Copy, a_whole_matrix_of_a_real_model_in_tasks_of_any_size) {
  constexpr uint64_t kPitch = 34816, kRow = 17408, kRows = 5120;
  const Sparse source(kPitch * kRows), target(kRow * kRows);
  for (uint64_t at = 0; at < kPitch * kRows; at += 509) source.data()[at] = static_cast<std::byte>(at / 509);
  const CopySource sources = {source.data(), kPitch * kRows};
  const CopyTarget targets = {target.data(), kRow * kRows};
  const CopyPlan plan{{strided(kRow, kPitch, kRow, kRows)}};
  ASSERT_TRUE(check_whole(plan, sources, targets));
  for (const uint64_t task_bytes_max : {1 << 20, 2 << 20, 4 << 20, 32 << 20}) {
    std::memset(target.data(), 0xee, kRow * kRows);
    ASSERT_TRUE(execute(plan, sources, targets, {.thread_count = 2, .task_bytes_max = task_bytes_max}));
    for (uint64_t row = 0; row < kRows; ++row) {
      const std::byte* wanted = source.data() + row * kPitch + kRow;
      ASSERT_EQ(std::memcmp(target.data() + row * kRow, wanted, kRow), 0) << row << " of " << task_bytes_max;
    }
  }
}

TEST(Copy, offsets_beyond_four_gibibytes) {
  constexpr uint64_t kPitch = (uint64_t{3} << 30) + 1;
  const Sparse source(2 * kPitch + 4096);
  const Bytes rows = pattern(3 * 4096);
  for (uint64_t row = 0; row < 3; ++row) std::memcpy(source.data() + row * kPitch, rows.data() + row * 4096, 4096);
  Bytes target(3 * 4096);
  const CopySource sources = {source.data(), 2 * kPitch + 4096};
  const CopyTarget targets = target;
  const CopyPlan plan{{strided(0, kPitch, 4096, 3)}};
  ASSERT_TRUE(check_whole(plan, sources, targets));
  ASSERT_TRUE(execute(plan, sources, targets, {}));
  EXPECT_TRUE(target == rows);
}

TEST(Copy, sixteen_threads_read_random_windows_of_one_plan) {
  constexpr uint64_t kRows = 128, kRow = 4096;
  const CopyPlan plan{{strided(0, 2 * kRow, kRow, kRows)}};
  const Bytes source = pattern(2 * kRow * kRows);
  const CopySource sources = source;
  Bytes expected(kRow * kRows);
  const CopyTarget all = expected;
  naive(plan, sources, all);
  std::vector<std::thread> threads;
  std::atomic<int> wrong_count{0};
  for (uint64_t thread = 0; thread < 16; ++thread) {
    threads.emplace_back([&, thread] {
      uint64_t state = thread;
      const auto random = [&](uint64_t below) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return (state >> 33) % below;
      };
      for (int round = 0; round < 1000; ++round) {
        const uint64_t offset = random(expected.size());
        Bytes part(1 + random(std::min<uint64_t>(expected.size() - offset, 20000)), kUntouched);
        const CopyTarget targets = part;
        const CopyPlan cut = window(plan, offset, part.size());
        const bool is_right = check_whole(cut, sources, targets) &&
                              execute(cut, sources, targets, {.thread_count = 1}) &&
                              std::memcmp(part.data(), expected.data() + offset, part.size()) == 0;
        wrong_count += !is_right;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong_count, 0);
}

TEST(Copy, a_hundred_thousand_records) {
  for (const uint64_t record_count : {1, 400, 100000}) {
    const Bytes source = pattern(record_count * 3 + 64);
    Bytes memory(record_count * 3, kUntouched);
    CopyPlan plan;
    for (uint64_t at = 0; at < record_count; ++at) {
      Copy2D record = strided(at * 3, 0, at % 3, 1);  // a third of them hold nothing
      record.target_offset = at * 3;
      plan.records.push_back(record);
    }
    ASSERT_TRUE(check_plan(plan, source.size(), memory.size()));
    ASSERT_TRUE(execute(plan, source, memory, {.thread_count = 4, .task_bytes_max = 1024}));
    for (uint64_t at = 0; at < memory.size(); ++at) {
      const bool is_written = at % 3 < at / 3 % 3;
      ASSERT_EQ(memory[at], is_written ? source[at] : kUntouched) << at;
    }
  }
}

TEST(Copy, one_bad_record_and_nothing_is_written) {
  const Bytes source = pattern(100);
  Bytes target(24, kUntouched);
  const CopySource sources = source;
  const CopyTarget targets = target;
  const CopyPlan plan = parse_plan("0 -> 0  1 row x 8 B\n96 -> 8  1 row x 8 B\n");
  const auto run = [&]() -> Status {
    TRY(check_plan(plan, sources.size(), targets.size()));
    TRY(execute(plan, sources, targets, {}));
    return {};
  };
  const Status status = run();
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().target, TargetState::untouched);
  EXPECT_TRUE(target == Bytes(24, kUntouched));
}

TEST(Copy, waits_for_the_bytes_of_each_task_in_source_order) {
  const Bytes source = pattern(8 << 20);
  Bytes target(4 << 20);
  const CopySource sources = source;
  const CopyTarget targets = target;
  uint64_t end = 0;
  CopyOptions options;
  options.thread_count = 1;
  options.task_bytes_max = 64 << 10;
  options.keep_spans = true;
  options.ready = [&](uint64_t offset, uint64_t size_bytes) -> Status {
    EXPECT_GE(offset + 4096, end);  // the gap behind the last row of a task is nobody's
    EXPECT_LE(size_bytes, (128u << 10));
    end = offset + size_bytes;
    return {};
  };
  const auto report = execute({{strided(4096, 8192, 4096, 1024)}}, sources, targets, options);
  ASSERT_TRUE(report);
  EXPECT_EQ(end, 8u << 20);
  EXPECT_EQ(report->task_count, 64u);
  ASSERT_EQ(report->spans.size(), 64u);
  EXPECT_GE(report->spans[1].begin_ns, report->spans[0].end_ns);
  EXPECT_EQ(report->spans[0].size_bytes, 64u << 10);
}

TEST(Copy, the_first_error_wins_and_says_whether_the_target_is_dirty) {
  const Bytes source = pattern(1 << 20);
  const CopySource sources = source;
  const CopyPlan plan{{strided(0, 0, 1 << 20, 1)}};
  for (const int thread_count : {1, 4}) {
    for (const int good_count : {0, 3}) {
      Bytes target(1 << 20, kUntouched);
      const CopyTarget targets = target;
      std::atomic<int> call_count{0};
      CopyOptions options;
      options.thread_count = thread_count;
      options.task_bytes_max = 16 << 10;
      options.ready = [&](uint64_t, uint64_t) -> Status {
        if (call_count++ < good_count) return {};
        return fail(Code::changed, "the file was replaced");
      };
      const auto report = execute(plan, sources, targets, options);
      ASSERT_FALSE(report);
      EXPECT_EQ(report.error().code, Code::changed);
      const bool is_untouched = target == Bytes(1 << 20, kUntouched);
      EXPECT_EQ(report.error().target, is_untouched ? TargetState::untouched : TargetState::dirty);
      EXPECT_TRUE(is_untouched || good_count > 0);
    }
  }
}

TEST(Copy, a_cancelled_copy_ends_and_its_memory_may_be_freed_at_once) {
  const Bytes source = pattern(1 << 20);
  const CopySource sources = source;
  const CopyPlan plan{{strided(0, 0, 1 << 20, 1)}};
  for (int stop_after = 0; stop_after < 20; ++stop_after) {
    int32_t cancel = stop_after == 0;
    auto target = std::make_unique<Bytes>(1 << 20, kUntouched);
    const CopyTarget targets = *target;
    std::atomic<int> call_count{0};
    CopyOptions options;
    options.thread_count = 4;
    options.task_bytes_max = 16 << 10;
    options.cancel = &cancel;
    options.ready = [&](uint64_t, uint64_t) -> Status {
      if (++call_count == stop_after) __atomic_store_n(&cancel, 1, __ATOMIC_RELAXED);
      return {};
    };
    const auto report = execute(plan, sources, targets, options);
    target.reset();
    ASSERT_FALSE(report);
    EXPECT_EQ(report.error().code, Code::cancelled);
    EXPECT_TRUE(stop_after > 0 || report.error().target == TargetState::untouched);
  }
}

TEST(Copy, no_allocation_grows_with_the_payload) {
  const auto in_use = [] {
    const auto info = mallinfo2();
    return info.uordblks + info.hblkhd;
  };
  for (const uint64_t row_count : {1000, 100000}) {
    const Sparse source(row_count * 2048), target(row_count * 1024);
    const CopySource sources = {source.data(), row_count * 2048};
    const CopyTarget targets = {target.data(), row_count * 1024};
    const CopyPlan plan{{strided(0, 2048, 1024, row_count)}};
    size_t most = 0;
    CopyOptions options;
    options.thread_count = 1;
    options.task_bytes_max = 4096;
    options.ready = [&](uint64_t, uint64_t) -> Status {
      most = std::max(most, in_use());
      return {};
    };
    const size_t before = in_use();
    ASSERT_TRUE(execute(plan, sources, targets, options));
    EXPECT_LE(most, before + 4096);
  }
}

}  // namespace
}  // namespace tensord::memory
