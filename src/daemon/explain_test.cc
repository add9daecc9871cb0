#include "daemon/explain.h"

#include <gtest/gtest.h>

namespace tensord::daemon {

namespace {

constexpr int64_t kMs = 1'000'000;

doctor::Rates all_rates(double bytes_per_s) {
  doctor::Rates rates;
  for (const char* name : {"memcpy_all", "cache_pread", "cache_stream", "disk_direct", "disk_buffered"})
    rates.bytes_per_s[name] = bytes_per_s;
  return rates;
}

// Index 0-5 ms, waits for memory 8-10 ms, fills 10-110 ms.
engine::LoadReport some_load() {
  engine::LoadReport report{.load = 1, .replica = 1, .path = "/m", .state = engine::LoadState::ready};
  report.begin_ns = 1000 * kMs;
  report.fill_ns = 1010 * kMs;
  report.wall_ns = 110 * kMs;
  report.index_ns = 5 * kMs;
  report.memory_ns = 2 * kMs;
  report.thread_count = 2;
  report.counters = {.bytes = 100'000'000, .read_ns = 150 * kMs, .check_ns = 20 * kMs, .touch_ns = 30 * kMs};
  report.cpu_ns = 195 * kMs;
  report.cached_bytes = 100'000'000;
  return report;
}

engine::Use some_use(int64_t map_begin_ms, int64_t begin_ms) {
  engine::Use use{.process_id = 7, .process_name = "python"};
  use.map_begin_ns = map_begin_ms * kMs;
  use.map_ns = kMs;
  use.begin_ns = begin_ms * kMs;
  use.plan_ns = kMs;
  use.copy_ns = 40 * kMs;
  use.wait_ns = 20 * kMs;
  use.copy_bytes = 1000;
  use.thread_count = 2;
  return use;
}

std::string text_of(const Explanation& explained) {
  std::string out;
  for (const Phase& phase : explained.phases) {
    out += phase.lane + " " + phase.name + " " + std::to_string(phase.begin_ns / kMs) + "-" +
           std::to_string(phase.end_ns / kMs) + " " + std::to_string(phase.ns() / kMs) + "\n";
  }
  return out + explained.limited_by + "\n";
}

}  // namespace

TEST(Explain, a_load_is_index_memory_touch_read_and_check_on_one_axis) {
  engine::LoadReport report = some_load();
  EXPECT_EQ(text_of(explain(report, {})),
            "daemon index 0-5 5\n"
            "daemon wait_for_memory 8-10 2\n"
            "daemon touch 10-110 15\n"
            "daemon read 10-110 75\n"
            "daemon check 10-110 10\n"
            "page cache\n");
}

TEST(Explain, names_what_took_longest) {
  const auto limit_of = [](auto change) {
    engine::LoadReport report = some_load();
    change(report);
    return explain(report, {}).limited_by;
  };
  using Report = engine::LoadReport;
  EXPECT_EQ(limit_of([](Report& report) { report.index_ns = 200 * kMs; }), "index");
  EXPECT_EQ(limit_of([](Report& report) { report.memory_ns = 200 * kMs; }), "waiting for memory");
  EXPECT_EQ(limit_of([](Report& report) { report.counters.touch_ns = 180 * kMs, report.cpu_ns = 350 * kMs; }),
            "fresh memory");
  EXPECT_EQ(limit_of([](Report& report) { report.counters.check_ns = 180 * kMs, report.cpu_ns = 350 * kMs; }),
            "hashing");
  EXPECT_EQ(limit_of([](Report& report) { report.cpu_ns = 20 * kMs; }), "lock");
  EXPECT_EQ(limit_of([](Report& report) {
              std::swap(report.cached_bytes, report.direct_bytes);
              report.cpu_ns = 20 * kMs;
            }),
            "disk");
  EXPECT_EQ(limit_of([](Report& report) { report.uses = {some_use(1001, 1300)}; }), "waiting for the client");
  EXPECT_EQ(limit_of([](Report& report) {
              report.uses = {some_use(1001, 1112)};
              report.uses[0].copy_ns = 500 * kMs;
            }),
            "memory copy");
  EXPECT_EQ(limit_of([](Report& report) { report = Report(); }), "none");
}

TEST(Explain, what_is_possible_is_the_slower_of_disk_and_page_cache) {
  engine::LoadReport report = some_load();
  EXPECT_EQ(explain(report, {}).possible, 0);
  doctor::Rates rates = all_rates(10e9);
  EXPECT_NEAR(explain(report, rates).possible, 10e9, 1);
  EXPECT_EQ(explain(report, rates).possible_by, "page cache");
  std::swap(report.cached_bytes, report.direct_bytes);
  rates.bytes_per_s["disk_direct"] = 2e9;
  EXPECT_EQ(explain(report, rates).possible_by, "disk");
  EXPECT_NEAR(explain(report, rates).possible, 2e9, 1);
  rates.bytes_per_s.erase("disk_direct");  // never measured
  EXPECT_EQ(explain(report, rates).possible, 0);
}

TEST(Explain, a_resident_replica_shows_only_what_clients_did_since_it_was_opened) {
  engine::LoadReport report = some_load();
  report.uses = {some_use(1001, 1100), some_use(5001, 5010), some_use(5001, 5060)};
  report.reopened_ns = 5000 * kMs;
  const Explanation explained = explain(report, all_rates(10e9));
  EXPECT_TRUE(explained.resident);
  EXPECT_EQ(explained.moved_bytes, 2000u);
  EXPECT_EQ(explained.moved_ns, 101 * kMs);
  EXPECT_EQ(explained.possible_by, "memory copy");
  EXPECT_EQ(text_of(explained),
            "python 7 map 1-2 1\n"
            "python 7 wait_for_client 2-101 17\n"
            "python 7 plan 10-61 2\n"
            "python 7 wait 11-101 20\n"
            "python 7 copy 11-101 60\n"
            "memory copy\n");
}

TEST(Explain, loads_that_wait_or_failed_say_so) {
  engine::LoadReport report = some_load();
  report.fill_ns = 0;
  report.counters = {};
  report.state = engine::LoadState::waiting;
  report.memory_ns = 50 * kMs;
  EXPECT_EQ(explain(report, {}).limited_by, "waiting for memory");
  report.memory_ns = 0;
  EXPECT_EQ(explain(report, {}).limited_by, "index");
  report = some_load();
  report.state = engine::LoadState::failed;
  report.error = base::Error{base::Code::changed, "it grew; load it again"};
  EXPECT_EQ(explain(report, {}).advice, "The error says what to do.");
}

}  // namespace tensord::daemon
