#include "daemon/doctor.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <cerrno>
#include <filesystem>
#include <fstream>

#include "daemon/waterfall.h"

namespace tensord::daemon {

namespace {

constexpr int64_t kMs = 1'000'000;

MachineRates some_rates() {
  MachineRates rates;
  for (const NamedRate& named : named_rates()) rates.*named.rate = 10e9;
  return rates;
}

engine::LoadReport some_load() {
  engine::LoadReport report{.load = 1, .replica = 1, .path = "/m", .state = engine::LoadState::ready};
  report.begin_ns = 1000 * kMs;
  report.fill_ns = 1010 * kMs;
  report.wall_ns = 110 * kMs;
  report.index_ns = 5 * kMs;
  report.memory_ns = 2 * kMs;
  report.thread_count = 2;
  report.counters = {100'000'000, 150 * kMs, 20 * kMs};
  return report;
}

std::string text_of(const Waterfall& waterfall) {
  std::string out;
  for (const Bar& bar : waterfall.bars) {
    out += bar.lane + " " + bar.name + " " + std::to_string(bar.begin_ns / kMs) + "-" +
           std::to_string(bar.end_ns / kMs) + " " + std::to_string(static_cast<int>(bar.busy * 100 + 0.5)) +
           "\n";
  }
  return out + waterfall.limited_by + "\n";
}

}  // namespace

TEST(Waterfall, a_load_is_index_memory_read_and_check_on_one_axis) {
  engine::LoadReport report = some_load();
  EXPECT_EQ(
      text_of(waterfall_of(report, {})),
      "daemon index 0-5 100\ndaemon wait_for_memory 8-10 100\ndaemon read 10-110 75\ndaemon check 10-110 10\n"
      "page cache\n");
  report.direct_bytes = 100'000'000;
  EXPECT_EQ(waterfall_of(report, {}).limited_by, "disk");
  report.counters.check_ns = 180 * kMs;
  EXPECT_EQ(waterfall_of(report, {}).limited_by, "hashing");
  report.counters = {100'000'000, 10 * kMs, 10 * kMs};
  EXPECT_EQ(waterfall_of(report, {}).limited_by, "lock");
}

TEST(Waterfall, what_is_possible_is_the_slower_of_disk_and_cores) {
  engine::LoadReport report = some_load();
  EXPECT_EQ(waterfall_of(report, {}).possible, 0);
  MachineRates rates = some_rates();
  report.direct_bytes = 100'000'000;
  rates.disk_direct = 2e9;
  EXPECT_EQ(waterfall_of(report, rates).possible_by, "disk");
  EXPECT_NEAR(waterfall_of(report, rates).possible, 2e9, 1);
  rates.disk_direct = 0;  // never measured
  EXPECT_EQ(waterfall_of(report, rates).possible, 0);
}

TEST(Waterfall, a_resident_replica_shows_only_what_clients_did_since_it_was_opened) {
  engine::LoadReport report = some_load();
  report.reopened_ns = 5000 * kMs;
  engine::Use use{.process_id = 7, .process_name = "python"};
  use.map_begin_ns = 5001 * kMs;
  use.map_ns = kMs;
  use.begin_ns = 5010 * kMs;
  use.plan_ns = kMs;
  use.copy_ns = 40 * kMs;
  use.copy_bytes = 1000;
  use.thread_count = 2;
  report.uses = {use};
  const Waterfall waterfall = waterfall_of(report, {});
  EXPECT_TRUE(waterfall.resident);
  EXPECT_EQ(text_of(waterfall),
            "python 7 map 1-2 100\npython 7 plan 10-11 100\npython 7 wait 11-51 0\npython 7 copy 11-51 "
            "100\nmemory copy\n");
}

TEST(Waterfall, loads_that_wait_or_failed_say_so) {
  engine::LoadReport report = some_load();
  report.fill_ns = 0;
  report.state = engine::LoadState::waiting;
  EXPECT_EQ(waterfall_of(report, {}).limited_by, "waiting for memory");
  report = some_load();
  report.state = engine::LoadState::failed;
  report.error = base::Error{base::Code::changed, "it grew"};
  EXPECT_EQ(waterfall_of(report, {}).advice, "The file was written meanwhile: load it again.");
}

TEST(Doctor, verdicts_say_what_to_do_unless_all_is_good) {
  SystemFacts facts{
      .locked_bytes_max = UINT64_MAX, .descriptor_count_max = 1 << 20, .memory_available = 8ull << 30};
  facts.direct_align = 512;
  facts.free_bytes = 8ull << 30;
  const auto bad = [&](const MachineRates& rates) {
    std::string out;
    for (const Verdict& line : verdicts_of(facts, rates)) {
      EXPECT_EQ(line.grade == Verdict::Grade::good, line.advice.empty()) << line.name;
      if (line.grade != Verdict::Grade::good) out += line.name + ": " + grade_name(line.grade) + "\n";
    }
    return out;
  };
  MachineRates rates = some_rates();
  rates.memcpy_1 = 5e9;
  EXPECT_EQ(bad(rates), "");
  rates.disk_direct = 0.5e9;
  rates.cache_stream = 0;
  facts.io_uring_error = EPERM;
  facts.overcommit_memory = 2;
  EXPECT_EQ(bad(rates),
            "page cache, streamed: missing\ndisk, O_DIRECT: could be better\nio_uring: missing\n"
            "vm.overcommit_memory: could be better\n");
}

TEST(MachineRates, are_read_back_on_the_machine_that_wrote_them_and_nowhere_else) {
  std::string folder = "/tmp/tensord-machine-test-XXXXXX";
  ASSERT_NE(::mkdtemp(folder.data()), nullptr);
  const Machine machine{"cpu", 2, "6.1"};
  EXPECT_FALSE(load_rates(folder, machine));
  ASSERT_TRUE(save_rates(folder, machine, some_rates()));
  EXPECT_EQ(load_rates(folder, machine)->gather_all, 10e9);
  EXPECT_FALSE(load_rates(folder, {"cpu", 3, "6.1"}));
  for (const char* hostile :
       {"", "[]", "{}", "{\"version\": 1, \"machine\": 7}", "\xff{", "{\"version\": 1e999}",
        "{\"version\":1,\"machine\":{\"cpu\":\"cpu\",\"core_count\":2,\"kernel\":\"6.1\"},\"rates\":[]}",
        "{\"version\":1,\"machine\":{\"cpu\":\"cpu\",\"core_count\":2,\"kernel\":\"6.1\"},"
        "\"rates\":{\"memcpy_1\":-1}}"}) {
    std::ofstream(machine_file(folder)) << hostile;
    EXPECT_FALSE(load_rates(folder, machine)) << hostile;
  }
  std::filesystem::remove_all(folder);
}

}  // namespace tensord::daemon
