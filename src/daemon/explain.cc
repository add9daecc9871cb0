#include "daemon/explain.h"

#include <map>

#include "base/text.h"

namespace tensord::daemon {

using engine::LoadReport;
using engine::LoadState;
using engine::Use;

namespace {

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

struct Origins {
  uint64_t cached, direct, buffered;
  bool mostly_disk() const { return direct + buffered > cached; }
};

// Where the bytes came from; of sources that do not tell, what the devices delivered meanwhile.
Origins origins_of(const LoadReport& report) {
  if (report.cached_bytes + report.direct_bytes + report.buffered_bytes > 0)
    return {report.cached_bytes, report.direct_bytes, report.buffered_bytes};
  const uint64_t disk_bytes = std::min(report.disk_bytes, report.counters.bytes);
  return {report.counters.bytes - disk_bytes, 0, disk_bytes};
}

// Disk and cores work at the same time; reading the page cache and hashing share the cores.
void find_possible(Explanation& explained, const LoadReport& report, const doctor::Rates& rates) {
  if (explained.moved_bytes == 0) return;
  if (explained.resident) {
    explained.possible = rates.of("memcpy_all");
    explained.possible_by = "memory copy";
    return;
  }
  const auto seconds = [](uint64_t bytes, double rate) {
    return bytes == 0 ? 0 : static_cast<double>(bytes) / rate;
  };
  const Origins from = origins_of(report);
  const double threads = std::max<double>(report.thread_count, 1);
  const double cache_s = seconds(from.cached, std::max(rates.of("cache_pread"), rates.of("cache_stream")));
  const double hash_s = seconds(explained.moved_bytes, rates.of("hash_1") * threads);
  const double disk_s =
      seconds(from.direct, rates.of("disk_direct")) + seconds(from.buffered, rates.of("disk_buffered"));
  const double least_s = std::max(disk_s, cache_s + hash_s);
  constexpr double kNeverS = 1e12;  // a rate that is missing
  if (!(least_s > 0 && least_s < kNeverS)) return;
  explained.possible = static_cast<double>(explained.moved_bytes) / least_s;
  explained.possible_by = disk_s >= cache_s + hash_s ? "disk" : cache_s > hash_s ? "page cache" : "hashing";
}

struct Limit {
  const char* name;
  int64_t ns;  // of the path
  const char* advice;
};

// What the daemon waited for.
std::vector<Limit> load_limits(const Explanation& explained, const LoadReport& report) {
  const auto ns_of = [&](std::string_view name) {
    return std::find_if(explained.phases.begin(), explained.phases.end(),
                        [&](const Phase& phase) { return phase.name == name; })
        ->ns();
  };
  const engine::LoadCounters& counters = report.counters;
  const bool by_disk = origins_of(report).mostly_disk();
  const double rate = static_cast<double>(explained.moved_bytes) * 1e9 /
                      static_cast<double>(std::max<int64_t>(explained.moved_ns, 1));
  const bool well = explained.possible > 0 && rate > 0.8 * explained.possible;
  // Threads that take from the page cache run all the time, unless something keeps them from it.
  const int64_t ran_ns = counters.read_ns + counters.check_ns + counters.touch_ns;
  const int64_t threads = std::max<int64_t>(report.thread_count, 1);
  const int64_t stood_ns = by_disk ? 0 : std::max<int64_t>(ran_ns - report.cpu_ns, 0) / threads;
  return {
      {"index", ns_of("index"),
       "Reading the headers took longest: the files are many, small, or on a slow disk."},
      {"waiting for memory", ns_of("wait_for_memory"),
       "It waited for room: raise host_memory, or let go of what `tensord ls` lists."},
      {"fresh memory", ns_of("touch"),
       "Memory was touched for the first time: `prefault` does that beforehand."},
      {"hashing", ns_of("check"), "Hashing took longer than reading: more read_threads or cores would help."},
      {by_disk ? "disk" : "page cache", ns_of("read") - stood_ns,
       by_disk ? well ? "The disk gives no more: keep the replica resident (`tensord pin`)."
                      : "The bytes came from the disk: keep the replica resident (`tensord pin`), or look "
                        "for what else reads from it."
       : well  ? "The page cache gives no more: keep the replica resident (`tensord pin`)."
               : "The bytes came from the page cache: more read_threads may help, or keep the replica "
                 "resident (`tensord pin`)."},
      {"lock", stood_ns,
       "The read threads stood still most of the time: other loads or programs had the cores."},
  };
}

// What came after every byte was there, by the client that ended last.
std::vector<Limit> client_limits(const Explanation& explained) {
  const Phase* last = nullptr;
  for (const Phase& phase : explained.phases) {
    const bool idles = std::string_view(phase.name) == "wait_for_client";
    if (idles && (last == nullptr || phase.end_ns > last->end_ns)) last = &phase;
  }
  if (last == nullptr) return {};
  return {{"waiting for the client", last->ns(),
           "The bytes were there before the client asked for them: look at what it does meanwhile."},
          {"memory copy", last->end_ns - last->begin_ns - last->ns(),
           "Copying out of shared memory took longest: use the tensors where they are (zero copy), or more "
           "threads."}};
}

void find_limit(Explanation& explained, const LoadReport& report) {
  std::vector<Limit> limits = client_limits(explained);
  if (!explained.resident) {
    const auto more = load_limits(explained, report);
    limits.insert(limits.end(), more.begin(), more.end());
  }
  constexpr int64_t kWorthNamingNs = 1'000'000;
  Limit most{"none", kWorthNamingNs, "It was over before anything could hold it up."};
  for (const Limit& limit : limits) {
    if (limit.ns > most.ns) most = limit;
  }
  explained.limited_by = most.name;
  explained.advice = most.advice;
  if (report.state == LoadState::waiting) {
    const bool memory = report.memory_ns > 0;
    explained.limited_by = memory ? "waiting for memory" : "index";
    explained.advice =
        memory ? "It waits for memory that others are giving back." : "It still reads the headers.";
  }
  if (report.state == LoadState::failed && report.error) {
    const base::Code code = report.error->code;
    explained.advice = code == base::Code::corrupt   ? "Compare the file with its origin."
                       : code == base::Code::changed ? "The file was written meanwhile: load it again."
                       : code == base::Code::exhausted
                           ? "Let go of what the message names, or raise host_memory."
                       : code == base::Code::cancelled ? "Load it again if it is still wanted."
                                                       : "The message says what went wrong.";
  }
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
