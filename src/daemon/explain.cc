#include "daemon/explain.h"

#include <cmath>
#include <map>

#include "base/text.h"

namespace tensord::daemon {

using engine::LoadReport;
using engine::Use;

namespace {

enum LoadPhase : size_t { kIndex, kMemory, kTouch, kRead, kCheck };  // in their order

std::vector<Phase> load_phases(const LoadReport& report) {
  const engine::LoadCounters& counters = report.counters;
  const int64_t wall_ns = report.wall_ns;
  const int64_t fill_ns = report.fill_ns > 0 ? report.fill_ns - report.begin_ns : wall_ns;
  const int64_t threads = report.thread_count;
  return {
      {"daemon", "index", 0, report.index_ns, report.index_ns},
      {"daemon", "wait_for_memory", fill_ns - report.memory_ns, fill_ns, report.memory_ns},
      {"daemon", "touch", fill_ns, wall_ns, counters.touch_ns, threads},
      {"daemon", "read", fill_ns, wall_ns, counters.read_ns, threads, counters.bytes},
      {"daemon", "check", fill_ns, wall_ns, counters.check_ns, threads, counters.bytes},
  };
}

// What one process did with the replica, all its calls together. `ready_ns`: every byte was there, on the axis.
std::vector<Phase> client_phases(const std::string& lane, const std::vector<const Use*>& uses,
                                 int64_t origin_ns, int64_t ready_ns) {
  const int64_t map_ns = uses.front()->map_begin_ns - origin_ns;
  const int64_t mapped_ns = map_ns + uses.front()->map_ns;  // told again with every use of one mapping
  const int64_t there_ns = std::max(ready_ns, mapped_ns);
  Phase map{lane, "map", map_ns, mapped_ns, mapped_ns - map_ns};
  Phase idle{lane, "wait_for_client", there_ns, there_ns};
  Phase plan{lane, "plan"}, wait{lane, "wait"}, copy{lane, "copy"};
  const auto extend = [](Phase& phase, int64_t begin_ns, int64_t end_ns, int64_t thread_ns) {
    phase.begin_ns = phase.end_ns == 0 ? begin_ns : std::min(phase.begin_ns, begin_ns);
    phase.end_ns = std::max(phase.end_ns, end_ns);
    phase.thread_ns += thread_ns;
  };
  int64_t called_ns = 0;  // since every byte was there
  for (const Use* use : uses) {
    const int64_t threads = std::max<int64_t>(use->thread_count, 1);
    const int64_t begin_ns = use->begin_ns - origin_ns;
    const int64_t copy_ns = begin_ns + use->plan_ns, end_ns = copy_ns + use->copy_ns;
    extend(plan, begin_ns, copy_ns, use->plan_ns);
    extend(wait, copy_ns, end_ns, use->wait_ns);
    extend(copy, copy_ns, end_ns, std::max<int64_t>(use->copy_ns * threads - use->wait_ns, 0));
    wait.thread_count = copy.thread_count = std::max(copy.thread_count, threads);
    copy.bytes += use->copy_bytes;
    called_ns += std::max<int64_t>(end_ns - std::max(begin_ns, there_ns), 0);
  }
  idle.end_ns = std::max(there_ns, copy.end_ns);
  idle.thread_ns = std::max<int64_t>(idle.end_ns - there_ns - called_ns, 0);
  return {std::move(map), std::move(idle), std::move(plan), std::move(wait), std::move(copy)};
}

// Disk and page cache are read at the same time.
void find_possible(Explanation& explained, const LoadReport& report, const doctor::Rates& rates) {
  const auto seconds = [&](uint64_t bytes, std::string_view rate) {
    return bytes == 0 ? 0 : static_cast<double>(bytes) / rates.of(rate);
  };
  const bool streams = rates.of("cache_stream") > rates.of("cache_pread");
  const double cache_s = seconds(report.cached_bytes, streams ? "cache_stream" : "cache_pread");
  const double disk_s =
      seconds(report.direct_bytes, "disk_direct") + seconds(report.buffered_bytes, "disk_buffered");
  const double copy_s = seconds(explained.moved_bytes, "memcpy_all");
  const double least_s = explained.resident ? copy_s : std::max(disk_s, cache_s);
  if (!(least_s > 0) || std::isinf(least_s)) return;  // also: a rate that is missing
  explained.possible = static_cast<double>(explained.moved_bytes) / least_s;
  explained.possible_by = explained.resident ? "memory copy" : disk_s > cache_s ? "disk" : "page cache";
}

struct Limit {
  const char* name;
  int64_t ns;  // of the path
  const char* advice;
};

// What the daemon waited for.
std::vector<Limit> load_limits(const Explanation& explained, const LoadReport& report) {
  const auto ns_of = [&](size_t phase) { return explained.phases[phase].ns(); };
  const engine::LoadCounters& counters = report.counters;
  const bool by_disk = report.direct_bytes + report.buffered_bytes > report.cached_bytes;
  // Threads that take from the page cache run all the time, unless something keeps them from it.
  const int64_t idle_ns = counters.read_ns + counters.check_ns + counters.touch_ns - report.cpu_ns;
  const int64_t threads = std::max<int64_t>(report.thread_count, 1);
  const int64_t stood_ns = by_disk ? 0 : std::max<int64_t>(idle_ns, 0) / threads;
  return {{"index", ns_of(kIndex), "The headers took longest: many or small files, or a slow disk."},
          {"waiting for memory", ns_of(kMemory), "Raise host_memory, or let go of what `tensord ls` lists."},
          {"fresh memory", ns_of(kTouch), "`prefault` touches memory before loads need it."},
          {"hashing", ns_of(kCheck), "More read_threads or cores would help."},
          {by_disk ? "disk" : "page cache", ns_of(kRead) - stood_ns,
           by_disk ? "Keep it resident (`tensord pin`), or see what else reads from the disk."
                   : "Keep it resident (`tensord pin`); more read_threads may help."},
          {"lock", stood_ns, "The read threads stood still: other loads or programs had the cores."}};
}

// What came after every byte was there, by the client that ended last.
void add_client_limits(std::vector<Limit>& limits, const Explanation& explained) {
  const Phase* last = nullptr;
  for (const Phase& phase : explained.phases) {
    const bool idles = std::string_view(phase.name) == "wait_for_client";
    if (idles && (last == nullptr || phase.end_ns > last->end_ns)) last = &phase;
  }
  if (last == nullptr) return;
  limits.push_back({"waiting for the client", last->ns(), "The bytes were there before it asked for them."});
  limits.push_back({"memory copy", last->end_ns - last->begin_ns - last->ns(),
                    "Use the tensors where they are (zero copy), or more threads."});
}

void find_limit(Explanation& explained, const LoadReport& report) {
  constexpr int64_t kWorthNamingNs = 1'000'000;
  std::vector<Limit> limits;
  if (!explained.resident) limits = load_limits(explained, report);
  add_client_limits(limits, explained);
  limits.push_back({"none", kWorthNamingNs, "It was over before anything could hold it up."});
  const auto less = [](const Limit& a, const Limit& b) { return a.ns < b.ns; };
  const Limit most = *std::max_element(limits.begin(), limits.end(), less);
  explained.limited_by = most.name;
  explained.advice = report.error ? "The error says what to do." : most.advice;
}

}  // namespace

Explanation explain(const LoadReport& report, const std::optional<doctor::Rates>& rates) {
  const auto is_since = [&](const Use& use) {
    return report.reopened_ns > 0 && use.map_begin_ns >= report.reopened_ns;
  };
  Explanation explained{.resident = std::any_of(report.uses.begin(), report.uses.end(), is_since)};
  explained.origin_ns = explained.resident ? report.reopened_ns : report.begin_ns;
  if (!explained.resident) explained.phases = load_phases(report);
  const int64_t ready_ns = explained.resident ? 0 : report.wall_ns;
  std::map<std::string, std::vector<const Use*>> clients;
  for (const Use& use : report.uses) {
    if (is_since(use) == explained.resident)
      clients[base::text(use.process_name, " ", use.process_id)].push_back(&use);
  }
  for (const auto& [lane, uses] : clients) {
    for (Phase& phase : client_phases(lane, uses, explained.origin_ns, ready_ns))
      explained.phases.push_back(std::move(phase));
  }
  explained.span_ns = ready_ns;
  explained.moved_bytes = explained.resident ? 0 : report.counters.bytes;
  for (const Phase& phase : explained.phases) {
    explained.span_ns = std::max(explained.span_ns, phase.end_ns);
    if (explained.resident) explained.moved_bytes += std::string_view(phase.name) == "copy" ? phase.bytes : 0;
  }
  explained.moved_ns = explained.resident ? explained.span_ns : report.wall_ns;
  if (rates) find_possible(explained, report, *rates);
  find_limit(explained, report);
  return explained;
}

}  // namespace tensord::daemon
