// hot_load, cold_load, verification, group, churn, small: from files to tensors that can be used.
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/text.h"
#include "bench/checkpoint.h"
#include "bench/gather.h"
#include "bench/peer.h"
#include "bench/processes.h"
#include "bench/raw_reader.h"

namespace tensord::bench {

using base::kGiB;
using base::kMiB;

namespace {

enum class Cache { hot, cold };

// Evicts, so that a load finds its segments in the pool, and empties the page cache for a cold one.
Status make_ready(const Daemon& daemon, const std::string& path, Cache cache) {
  TRY(daemon.evict(path));
  if (cache == Cache::hot) return {};
  TRY(drop_cache(path));
  std::error_code ignored;
  touch_free_memory(std::filesystem::file_size(path, ignored));  // for the page cache of those that read through it
  return {};
}

// From the request to the last byte, checked.
Result<Sample> load(const Daemon& daemon, const std::string& path, Cache cache) {
  TRY(make_ready(daemon, path, cache));
  const Stopwatch stopwatch({daemon.pid()});
  TRY_ASSIGN(const auto model, open_ready(path));
  return stopwatch.read();
}

Status compare_replica(const std::string& path) {
  TRY_ASSIGN(const auto model, open_ready(path));
  TRY_ASSIGN(const memory::Mapped file, map_file(path));
  for (const tensor::Tensor& tensor : model->index().tensors) {
    if (std::memcmp(model->data(tensor), file.data() + tensor.offset, tensor.size_bytes) != 0) {
      return base::fail(base::Code::corrupt, path + ": the replica differs from the file");
    }
  }
  return {};
}

std::vector<Contender> load_peers(Bench& bench, const Daemon& daemon, const std::string& path, uint64_t size_bytes,
                                  Cache cache) {
  return peer_acts(
      bench, daemon, {{"act", "load"}, {"path", path}},
      [&daemon, path, cache] { return make_ready(daemon, path, cache); },
      cache == Cache::cold ? 2 * size_bytes : size_bytes);
}

// What copies a file that the machine can hold twice, but not three times, is out.
void keep_those_that_share(std::vector<Contender>& peers, uint64_t size_bytes) {
  for (Contender& peer : peers) {
    if (peer.name.find("mapped") != peer.name.npos || peer.name.starts_with("tensord")) continue;
    peer.act = [size_bytes]() -> Result<Sample> {
      return base::fail(base::Code::unsupported,
                        base::text("a copy of its own needs ", size_bytes / kGiB, " GiB more than is free"));
    };
  }
}

Status race_hot(Bench& bench, const char* name, const std::string& path, double goal) {
  TRY_ASSIGN(const Daemon daemon, Daemon::start(bench.options()));
  constexpr uint64_t kMemoryMax = 2 * kGiB;  // of the ceiling; far more than any cache
  TRY_ASSIGN(const HotReader reader, HotReader::make(path, daemon.read_thread_count(), kMemoryMax));
  TRY(load(daemon, path, Cache::hot));  // makes the segments and the record of digests
  TRY(compare_replica(path));
  auto peers = load_peers(bench, daemon, path, reader.size_bytes(), Cache::hot);
  if (available_bytes() < reader.size_bytes() + 2 * kGiB) keep_those_that_share(peers, reader.size_bytes());
  TRY_ASSIGN(const auto ceilings, fastest(reader.ways(), 3, bench.tiny() ? 1 : 2));
  TRY_ASSIGN(const Race raced, race(
                                   bench.options(), ceilings, [&] { return load(daemon, path, Cache::hot); }, peers));
  bench.add(race_figure(base::text(name, ", verified load"), raced, static_cast<double>(reader.size_bytes()),
                        at_least(goal)));
  return {};
}

// ---- group -------------------------------------------------------------------------------------------------

constexpr int kRanks = 4;
constexpr int64_t kArrivals_ms[kRanks] = {0, 50, 150, 400};

struct GroupBoard {
  pthread_barrier_t barrier;
  int64_t begin_ns;
  int64_t end_ns[kRanks];
};

void wait_until(int64_t time_ns) {
  const timespec time{time_ns / 1'000'000'000, time_ns % 1'000'000'000};
  ::clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, nullptr);
}

uint64_t disk_bytes_of_children() {
  rusage usage;
  ::getrusage(RUSAGE_CHILDREN, &usage);
  return static_cast<uint64_t>(usage.ru_inblock) * 512;
}

// Four ranks, one after another, each until it has its slices. From the first one's arrival to the last one's end.
struct Group {
  const Daemon& daemon;
  const std::string& path;
  const std::vector<TensorShape>& shapes;
  bool check = true;  // every byte, once
  std::vector<double> disk_bytes;

  Status run_rank(int rank, GroupBoard& board) const {
    const auto slices = rank_slices(shapes, kRanks, static_cast<uint64_t>(rank), Part::all);
    auto target = make_memory(packed_bytes(slices));
    ::pthread_barrier_wait(&board.barrier);
    ::pthread_barrier_wait(&board.barrier);
    if (!target) return base::pass_on(target);
    wait_until(board.begin_ns + kArrivals_ms[rank] * 1'000'000);
    TRY_ASSIGN(auto model, client::Model::open({path}, {.autostart = client::Autostart::no}));
    TRY_ASSIGN(Gather gather, Gather::make(std::move(model), slices, std::move(*target)));
    TRY(gather.run_product());
    board.end_ns[rank] = base::monotonic_ns();
    return check ? gather.check(path) : Status();
  }

  Result<Sample> run() {
    TRY(make_ready(daemon, path, Cache::cold));
    TRY_ASSIGN(const memory::Mapped shared, share_memory(sizeof(GroupBoard)));
    auto& board = *reinterpret_cast<GroupBoard*>(shared.data());
    make_barrier(board.barrier, kRanks + 1);
    TRY_ASSIGN(Clients ranks, Clients::start(kRanks, [&](int rank) { return run_rank(rank, board); }));
    ::pthread_barrier_wait(&board.barrier);  // their memory is touched
    const uint64_t before = daemon.disk_bytes() + disk_bytes_of_children();
    board.begin_ns = base::monotonic_ns() + 1'000'000;
    ::pthread_barrier_wait(&board.barrier);
    TRY(ranks.wait());
    if (!check)  // comparing reads the file, too
      disk_bytes.push_back(static_cast<double>(daemon.disk_bytes() + disk_bytes_of_children() - before));
    check = false;
    const int64_t end_ns = *std::max_element(std::begin(board.end_ns), std::end(board.end_ns));
    return Sample(static_cast<double>(end_ns - board.begin_ns) / 1e9);
  }
};

}  // namespace

Status run_hot_load(Bench& bench) {
  TRY_ASSIGN(const std::string large, make_checkpoint(bench, "large.safetensors", qwen_shapes(large_qwen(bench))));
  TRY(race_hot(bench, "2 GB", large, 0.92));
  const auto shapes = qwen_shapes(huge_qwen(bench));
  uint64_t bytes = 0;
  for (const TensorShape& shape : shapes) bytes += shape.size_bytes();
  struct statvfs disk;
  ::statvfs(bench.options().folder.c_str(), &disk);
  const bool is_there = ::access((bench.options().folder + "/huge.safetensors").c_str(), F_OK) == 0;
  // Page cache, replica, and the ceiling's memory; in files of other runs the disk's part is spent already.
  if (available_bytes() < 2 * bytes + 3 * kGiB || (!is_there && disk.f_bavail * disk.f_frsize < bytes + kGiB)) {
    bench.skip("8 GB, verified load", "needs 19 GiB of free memory and 9 GiB of disk");
    return {};
  }
  TRY_ASSIGN(const std::string huge, make_checkpoint(bench, "huge.safetensors", shapes));
  return race_hot(bench, "8 GB", huge, 0.92);
}

Status run_cold_load(Bench& bench) {
  TRY_ASSIGN(const std::string path, make_checkpoint(bench, "cold.safetensors", qwen_shapes(cold_qwen(bench))));
  if (const Status able = drop_cache(path); !able) {
    bench.skip("cold load", able.error().message);
    return {};
  }
  TRY_ASSIGN(const auto reader, DirectReader::make(path));
  TRY_ASSIGN(const Daemon daemon, Daemon::start(bench.options()));
  TRY(load(daemon, path, Cache::cold));
  TRY(compare_replica(path));
  const auto peers = load_peers(bench, daemon, path, reader->size_bytes(), Cache::cold);
  TRY_ASSIGN(const auto ceilings, reader->fastest_ways(bench.options(), 3));
  TRY_ASSIGN(const Race raced, race(
                                   bench.options(), ceilings, [&] { return load(daemon, path, Cache::cold); }, peers));
  bench.add(race_figure("1.3 GB, verified load", raced, static_cast<double>(reader->size_bytes()), at_least(0.97)));
  return {};
}

Status run_verification(Bench& bench) {
  TRY_ASSIGN(const std::string path, make_checkpoint(bench, "large.safetensors", qwen_shapes(large_qwen(bench))));
  TRY_ASSIGN(const HotReader reader,
             HotReader::make(path, static_cast<int>(::sysconf(_SC_NPROCESSORS_ONLN)), 2 * kGiB));
  const Contender plain[] = {
      {"the same loop without hashing", [&] { return reader.read_bounced(HotReader::Hash::no); }}};
  TRY_ASSIGN(const Race raced,
             race(bench.options(), plain, [&] { return reader.read_bounced(HotReader::Hash::each_page); }));
  Figure figure = race_figure("raw loops: hashing each 4 KiB before it is streamed on", raced,
                              static_cast<double>(reader.size_bytes()), at_most(0.10));
  figure.unit = "of the load";
  figure.value = 1 - median(raced.ratios);
  bench.add(std::move(figure));
  return {};
}

Status run_group(Bench& bench) {
  const auto shapes = qwen_shapes(cold_qwen(bench));
  TRY_ASSIGN(const std::string path, make_checkpoint(bench, "cold.safetensors", shapes));
  if (const Status able = drop_cache(path); !able) {
    bench.skip("four ranks", able.error().message);
    return {};
  }
  TRY_ASSIGN(const auto reader, DirectReader::make(path));
  TRY_ASSIGN(const Daemon daemon, Daemon::start(bench.options()));
  TRY_ASSIGN(const auto ceilings, reader->fastest_ways(bench.options(), 1));
  Group group{daemon, path, shapes, true, {}};
  TRY_ASSIGN(const Race raced, race(bench.options(), ceilings, [&] { return group.run(); }));
  const auto bytes = static_cast<double>(reader->size_bytes());
  bench.add(race_figure("tp4, ranks after 0, 50, 150, 400 ms, until all have their slices", raced, bytes, {}));
  Figure read{.name = "read from the disk", .unit = "of the payload"};
  read.value = median(group.disk_bytes) / bytes;
  read.goal = at_most(1.02);
  bench.add(std::move(read));
  return {};
}

Status run_churn(Bench& bench) {
  Qwen qwen = large_qwen(bench);
  qwen.layers = 1;
  qwen.intermediate /= 8;
  TRY_ASSIGN(const std::string path, make_checkpoint(bench, "churn.safetensors", qwen_shapes(qwen)));
  TRY_ASSIGN(const Daemon daemon, Daemon::start(bench.options()));
  TRY_ASSIGN(const HotReader reader, HotReader::make(path, daemon.read_thread_count(), 2 * kGiB));
  const auto cycle = [&]() -> Result<Sample> {
    const Stopwatch stopwatch({daemon.pid()});
    TRY(open_ready(path));
    TRY(daemon.evict(path));
    return stopwatch.read();
  };
  TRY_ASSIGN(const auto ceilings, fastest(reader.ways(), 2, 2));
  const auto peers = load_peers(bench, daemon, path, reader.size_bytes(), Cache::hot);
  TRY_ASSIGN(const Race raced, race(bench.options(), ceilings, cycle, peers));
  bench.add(race_figure(base::text(reader.size_bytes() / 1'000'000, " MB, load and unload"), raced,
                        static_cast<double>(reader.size_bytes()), {}));
  const int count = bench.tiny() ? 3 : 200;
  const auto before = static_cast<double>(process_bytes(daemon.pid(), "VmRSS"));
  const Stopwatch stopwatch;
  for (int at = 0; at < count; ++at) TRY(cycle());
  bench.add({.name = "one after another", .unit = "cycles/s", .value = count / stopwatch.read().seconds});
  Figure memory{.name = base::text("the daemon's memory after ", count, " more cycles"), .unit = "of that before"};
  memory.value = static_cast<double>(process_bytes(daemon.pid(), "VmRSS")) / before;
  memory.goal = at_most(1.01);
  bench.add(std::move(memory));
  return {};
}

Status run_small(Bench& bench) {
  std::vector<TensorShape> shapes;
  std::vector<Slice> slices;
  for (int number = 0; number < (bench.tiny() ? 1000 : 100'000); ++number) {
    shapes.push_back({base::text("layers.", number, ".w"), {2048}});
    slices.push_back({shapes.back().name, 0, 1, 0, 2048});
  }
  TRY_ASSIGN(const std::string path, make_checkpoint(bench, "small-tensors.safetensors", shapes));
  TRY_ASSIGN(const Daemon daemon, Daemon::start(bench.options()));
  TRY_ASSIGN(const HotReader reader, HotReader::make(path, daemon.read_thread_count(), 2 * kGiB));
  TRY(load(daemon, path, Cache::hot));
  TRY(compare_replica(path));
  {
    const auto product = [&]() -> Result<Sample> {
      TRY(daemon.evict(path));
      const Stopwatch stopwatch({daemon.pid()});
      TRY_ASSIGN(const auto model, open_ready(path));
      for (const tensor::Tensor& tensor : model->index().tensors) touch(model->data(tensor), 1);
      return stopwatch.read();
    };
    TRY_ASSIGN(const auto ceilings, fastest(reader.ways(), 2, bench.tiny() ? 1 : 2));
    const auto peers = load_peers(bench, daemon, path, reader.size_bytes(), Cache::hot);
    TRY_ASSIGN(const Race raced, race(bench.options(), ceilings, product, peers));
    bench.add(race_figure(base::text(shapes.size(), " tensors of 4 KiB, open to all usable"), raced,
                          static_cast<double>(reader.size_bytes()), {}));
  }
  TRY_ASSIGN(const auto model, open_ready(path));
  TRY_ASSIGN(Gather gather, Gather::make(model, slices));
  const auto peers = slice_peers(bench, daemon, path, {slices});
  TRY_ASSIGN(Figure figure, race_gather(bench, gather, base::text("load_into of all ", shapes.size()), path, peers));
  bench.add(std::move(figure));
  return bench.drop_peers();
}

}  // namespace tensord::bench
