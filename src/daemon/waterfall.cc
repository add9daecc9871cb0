#include "daemon/waterfall.h"

#include <algorithm>
#include <map>

#include "base/text.h"

namespace tensord::daemon {

using engine::LoadReport;
using engine::LoadState;
using engine::Use;

namespace {

struct Limit {
  const char* name;
  int64_t ns;  // of the path
  std::string advice;
};

double share(int64_t part_ns, int64_t whole_ns) {
  if (whole_ns <= 0) return 0;
  return std::clamp(static_cast<double>(part_ns) / static_cast<double>(whole_ns), 0.0, 1.0);
}

int64_t ready_at(const LoadReport& report) { return report.begin_ns + report.wall_ns; }

// The daemon's part, relative to the request.
std::vector<Bar> load_bars(const LoadReport& report) {
  const int64_t threads = std::max<int64_t>(report.thread_count, 1);
  const int64_t wall_ns = report.wall_ns;
  std::vector<Bar> bars = {{"daemon", "index", 0, std::min(report.index_ns, wall_ns)}};
  if (report.fill_ns == 0) {
    if (report.memory_ns > 0) {
      bars.push_back(
          {"daemon", "wait_for_memory", std::max<int64_t>(wall_ns - report.memory_ns, 0), wall_ns});
    }
    return bars;
  }
  const int64_t fill_ns = report.fill_ns - report.begin_ns;
  const int64_t threads_ns = (wall_ns - fill_ns) * threads;
  const engine::LoadCounters& counters = report.counters;
  bars.push_back({"daemon", "wait_for_memory", fill_ns - report.memory_ns, fill_ns});
  if (counters.touch_ns > 0) {
    bars.push_back({"daemon", "touch", fill_ns, wall_ns, share(counters.touch_ns, threads_ns)});
  }
  bars.push_back({"daemon", "read", fill_ns, wall_ns, share(counters.read_ns, threads_ns), counters.bytes});
  bars.push_back({"daemon", "check", fill_ns, wall_ns, share(counters.check_ns, threads_ns), counters.bytes});
  return bars;
}

// What one process did, all its calls together.
struct Client {
  Bar map, plan, wait, copy;
  int64_t wait_ns = 0, copy_ns = 0, threads_ns = 0, plan_ns = 0;
  bool seen = false;

  void add(const std::string& lane, const Use& use, int64_t origin_ns) {
    const int64_t threads = std::max<int64_t>(use.thread_count, 1);
    const int64_t begin_ns = use.begin_ns - origin_ns;
    const int64_t copy_begin_ns = begin_ns + use.plan_ns;
    const int64_t map_ns = std::max<int64_t>(use.map_begin_ns - origin_ns, 0);
    if (!seen) {
      map = {lane, "map", map_ns, map_ns + use.map_ns};
      plan = {lane, "plan", begin_ns, begin_ns};
      wait = {lane, "wait", copy_begin_ns, copy_begin_ns};
      copy = {lane, "copy", copy_begin_ns, copy_begin_ns};
    }
    seen = true;
    plan.begin_ns = std::min(plan.begin_ns, begin_ns);
    plan.end_ns = std::max(plan.end_ns, copy_begin_ns);
    copy.begin_ns = std::min(copy.begin_ns, copy_begin_ns);
    copy.end_ns = std::max(copy.end_ns, copy_begin_ns + use.copy_ns);
    copy.bytes += use.copy_bytes;
    plan_ns += use.plan_ns;
    threads_ns += use.copy_ns * threads;
    wait_ns += use.wait_ns;
    copy_ns += std::max<int64_t>(use.copy_ns * threads - use.wait_ns, 0);
    plan.busy = share(plan_ns, plan.end_ns - plan.begin_ns);
    // Of the bar's time, gaps between calls included.
    const double called =
        threads_ns == 0 ? 0 : static_cast<double>(threads_ns) / static_cast<double>(threads);
    const double filled =
        std::min(1.0, called / std::max<double>(1, static_cast<double>(copy.end_ns - copy.begin_ns)));
    wait.busy = share(wait_ns, threads_ns) * filled;
    copy.busy = share(copy_ns, threads_ns) * filled;
    wait.begin_ns = copy.begin_ns;
    wait.end_ns = copy.end_ns;
  }
};

struct Clients {
  std::vector<Bar> bars;
  int64_t first_ns = 0;  // when the first of them called, on the axis
  int64_t end_ns = 0;
  uint64_t bytes = 0;
};

Clients client_bars(const std::vector<const Use*>& uses, int64_t origin_ns) {
  std::map<std::string, Client> clients;
  for (const Use* use : uses) {
    const std::string lane = base::text(use->process_name, " ", use->process_id);
    clients[lane].add(lane, *use, origin_ns);
  }
  Clients all;
  for (const auto& [lane, client] : clients) {
    all.bars.insert(all.bars.end(), {client.map, client.plan, client.wait, client.copy});
    all.first_ns = all.end_ns == 0 ? client.plan.begin_ns : std::min(all.first_ns, client.plan.begin_ns);
    all.end_ns = std::max({all.end_ns, client.copy.end_ns, int64_t{1}});
    all.bytes += client.copy.bytes;
  }
  return all;
}

struct Origins {
  uint64_t cached, direct, buffered;
};

// Where the bytes came from; of sources that do not tell, what the devices delivered meanwhile.
Origins origins_of(const LoadReport& report) {
  if (report.cached_bytes + report.direct_bytes + report.buffered_bytes > 0) {
    return {report.cached_bytes, report.direct_bytes, report.buffered_bytes};
  }
  const uint64_t disk = std::min(report.disk_bytes, report.counters.bytes);
  return {report.counters.bytes - disk, 0, disk};
}

// Disk and cores work at the same time, reading the page cache and hashing share the cores.
void find_possible(Waterfall& waterfall, const LoadReport& report, const MachineRates& rates) {
  const auto seconds = [](uint64_t bytes, double rate) {
    return bytes == 0 ? 0 : static_cast<double>(bytes) / rate;
  };
  const Origins from = origins_of(report);
  const double threads = std::max<double>(report.thread_count, 1);
  const double cache = std::max(rates.cache_pread, rates.cache_stream);
  const double disk_s = seconds(from.direct, rates.disk_direct) + seconds(from.buffered, rates.disk_buffered);
  const double cores_s = seconds(from.cached, cache) + seconds(waterfall.bytes, rates.hash_1 * threads);
  const double least_s = std::max(disk_s, cores_s);
  if (waterfall.bytes == 0 || least_s <= 0 || least_s > 1e12) return;  // also: a rate that is missing
  waterfall.possible = static_cast<double>(waterfall.bytes) / least_s;
  waterfall.possible_by = disk_s >= cores_s ? "disk" : from.cached > 0 ? "page cache" : "hashing";
}

// What the daemon waited for, on the path.
std::vector<Limit> load_limits(const LoadReport& report, const Waterfall& waterfall) {
  const int64_t threads = std::max<int64_t>(report.thread_count, 1);
  const int64_t read_ns = report.counters.read_ns / threads;
  const int64_t check_ns = report.counters.check_ns / threads;
  const Origins from = origins_of(report);
  const bool by_disk = from.direct + from.buffered > report.counters.bytes / 2;
  const double rate =
      static_cast<double>(waterfall.bytes) * 1e9 / std::max<double>(1, static_cast<double>(report.wall_ns));
  const bool well = waterfall.possible > 0 && rate > 0.8 * waterfall.possible;
  std::vector<Limit> limits = {
      {"index", report.index_ns,
       "Reading the headers took longest: the files are many, small, or on a slow disk."},
      {"waiting for memory", report.memory_ns,
       "It waited for room: raise host_memory, or let go of what `tensord ls` lists."},
      {by_disk ? "disk" : "page cache", read_ns,
       by_disk
           ? (well
                  ? "The disk gives no more: keep the replica resident (`tensord pin`), or use a faster disk."
                  : "The bytes came from the disk: keep the replica resident (`tensord pin`), use a faster "
                    "disk, or look for what else reads from it.")
           : (well ? "The page cache gives no more: keep the replica resident (`tensord pin`)."
                   : "The bytes came from the page cache: more read_threads may help.")},
      {"fresh memory", report.counters.touch_ns / threads,
       "Memory was touched for the first time: `prefault` does that beforehand."},
      {"hashing", check_ns, "Hashing took longer than reading: more read_threads or cores would help."}};
  if (report.fill_ns > 0) {
    limits.push_back(
        {"lock", ready_at(report) - report.fill_ns - read_ns - check_ns - report.counters.touch_ns / threads,
         "The read threads stood still for most of the time: other loads or programs had the cores."});
  }
  return limits;
}

void find_limit(Waterfall& waterfall, const LoadReport& report, const Clients& clients) {
  std::vector<Limit> limits;
  if (!waterfall.resident) limits = load_limits(report, waterfall);
  const int64_t ready_ns = waterfall.resident ? 0 : report.wall_ns;
  if (clients.end_ns > ready_ns) {  // what came after the last byte was there
    const int64_t gap_ns = std::max<int64_t>(clients.first_ns - ready_ns, 0);
    limits.push_back({"waiting for the client", gap_ns,
                      "The bytes were there before the client asked for them: look at what it does before."});
    limits.push_back(
        {"memory copy", clients.end_ns - ready_ns - gap_ns,
         "Copying out of shared memory took longest: use the tensors where they are (zero copy), or "
         "more threads."});
  }
  constexpr int64_t kWorthNamingNs = 1'000'000;
  const auto most = std::max_element(limits.begin(), limits.end(),
                                     [](const Limit& a, const Limit& b) { return a.ns < b.ns; });
  const bool named = most != limits.end() && most->ns >= kWorthNamingNs;
  waterfall.limited_by = named ? most->name : "none";
  waterfall.advice = named ? most->advice : "It was over before anything could hold it up.";
  if (report.state == LoadState::waiting) {
    waterfall.limited_by = report.memory_ns > 0 ? "waiting for memory" : "index";
    waterfall.advice = report.memory_ns > 0 ? "It waits for memory that others are giving back."
                                            : "It still reads the headers.";
  }
  if (report.state == LoadState::failed) {
    const base::Code code = report.error ? report.error->code : base::Code::internal;
    waterfall.advice = code == base::Code::corrupt   ? "Compare the file with its origin."
                       : code == base::Code::changed ? "The file was written meanwhile: load it again."
                       : code == base::Code::exhausted
                           ? "Let go of what the message names, or raise host_memory."
                       : code == base::Code::cancelled ? "Load it again if it is still wanted."
                                                       : "The message says what went wrong.";
  }
}

}  // namespace

Waterfall waterfall_of(const LoadReport& report, const std::optional<MachineRates>& rates) {
  Waterfall waterfall{.origin_ns = report.begin_ns, .bytes = report.counters.bytes};
  std::vector<const Use*> during, since;
  for (const Use& use : report.uses) {
    const bool later = report.reopened_ns > 0 && use.map_begin_ns >= report.reopened_ns;
    (later ? since : during).push_back(&use);
  }
  waterfall.resident = !since.empty();
  if (waterfall.resident) waterfall.origin_ns = report.reopened_ns;
  const Clients clients = client_bars(waterfall.resident ? since : during, waterfall.origin_ns);
  if (waterfall.resident) {
    waterfall.bytes = clients.bytes;
    if (rates && clients.bytes > 0) {
      waterfall.possible = rates->memcpy_all;
      waterfall.possible_by = "memory copy";
    }
  } else {
    waterfall.bars = load_bars(report);
    waterfall.span_ns = report.wall_ns;
    if (rates) find_possible(waterfall, report, *rates);
  }
  waterfall.bars.insert(waterfall.bars.end(), clients.bars.begin(), clients.bars.end());
  waterfall.span_ns = std::max(waterfall.span_ns, clients.end_ns);
  find_limit(waterfall, report, clients);
  return waterfall;
}

}  // namespace tensord::daemon
