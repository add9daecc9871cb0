// Measures rates. A run takes about a tenth of a second; rounds of all of them are made until there are enough or the time
// is up, so that a burst of somebody else's work meets one run of each and not all of one.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>
#include <future>
#include <optional>
#include <thread>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/text.h"
#include "doctor/doctor.h"
#include "memory/copy.h"
#include "memory/fresh_pages.h"
#include "storage/file_source.h"
#include "tensor/digest.h"

namespace tensord::doctor {

using base::kMiB;
using base::Result;
using memory::HugePages;
using storage::CachedPath;
using storage::SourceCounters;

namespace {

constexpr uint64_t kReadBytes = 4 * kMiB;
constexpr int kReadsAtOnce = 16;
constexpr int64_t kRunNs = 600'000'000;  // a slow disk is read for so long, not to the end
constexpr int64_t kTotalNs = 14'000'000'000;
// Source, target, fresh memory and the cached file take half of it at most.
constexpr uint64_t kMemoryShare = 8;

// Bytes a second of `work(at, size)` over [0, size_bytes), in pieces that threads take in turn.
template <typename Work>
double rate_of(int thread_count, uint64_t size_bytes, uint64_t piece_bytes, const Work& work) {
  std::atomic<uint64_t> next{0}, done{0};
  const int64_t begin_ns = base::monotonic_ns();
  const auto body = [&] {
    while (base::monotonic_ns() - begin_ns < kRunNs) {
      const uint64_t at = next.fetch_add(piece_bytes);
      if (at >= size_bytes) return;
      work(at, piece_bytes);
      done += piece_bytes;
    }
  };
  std::vector<std::thread> threads;
  for (int thread = 1; thread < thread_count; ++thread) threads.emplace_back(body);
  body();
  for (std::thread& thread : threads) thread.join();
  return static_cast<double>(done) * 1e9 / static_cast<double>(base::monotonic_ns() - begin_ns + 1);
}

// All sizes are powers of two. What cannot be had has the rate 0.
struct Bench {
  // As clients copy.
  double copy(int copy_threads, uint64_t row_bytes, uint64_t source_pitch) {
    tensor::Copy2D rows{.row_bytes = row_bytes, .row_count = size_bytes / source_pitch};
    rows.source_pitch = static_cast<int64_t>(source_pitch);
    rows.target_pitch = static_cast<int64_t>(row_bytes);
    const int64_t begin_ns = base::monotonic_ns();
    const auto copied = memory::execute({{rows}}, {source->data(), size_bytes}, {target->data(), size_bytes},
                                        {.thread_count = copy_threads});
    const auto took_ns = static_cast<double>(base::monotonic_ns() - begin_ns + 1);
    return copied ? static_cast<double>(copied->target_bytes) * 1e9 / took_ns : 0;
  }

  double touch(HugePages huge) {
    const auto fresh = memory::make_segment(size_bytes, ::getuid());
    if (!fresh) return 0;
    memory::FreshPages pages({&*fresh, 1}, size_bytes, huge);
    const auto touch_piece = [&](uint64_t at, uint64_t size) {
      pages.prepare(at, size);
      for (uint64_t page = at; page < at + size; page += 4096) fresh->data()[page] = std::byte{1};
    };
    const double rate = rate_of(thread_count, size_bytes, memory::kHugePageBytes, touch_piece);
    return pages.problem().empty() ? rate : 0;
  }

  // As the daemon reads and hashes; 0 where most bytes come from elsewhere than `counted`.
  double read(storage::FileSourceOptions options, uint64_t SourceCounters::*counted) {
    auto fd = base::duplicate(file.get());
    if (!fd) return 0;
    std::vector<storage::SourceFile> files;
    files.push_back({std::move(*fd), "the doctor's file", identity});
    const auto reader = storage::make_file_source(std::move(files), *pool, std::move(options));
    const auto read_piece = [&](uint64_t at, uint64_t size) {
      const auto done = std::make_shared<std::promise<void>>();
      const auto hasher = std::make_shared<tensor::Hasher>();
      hasher->begin();
      reader->read({.offset = at,
                    .target = {target->data() + at, size},
                    .done = [done](const base::Status&, storage::ReadTiming) { done->set_value(); },
                    .piece = [hasher](uint64_t, std::span<const std::byte> part) { hasher->add(part); }});
      done->get_future().wait();
    };
    const double rate = rate_of(kReadsAtOnce, size_bytes, kReadBytes, read_piece);
    const SourceCounters counters = reader->counters();
    return 2 * counters.*counted > counters.read_bytes ? rate : 0;
  }

  double read_cached(CachedPath path) {
    read({}, &SourceCounters::cached_bytes);  // now it is cached
    if (path != CachedPath::plain && !base::can_stream()) return 0;
    return read({.cached_path = path}, &SourceCounters::cached_bytes);
  }

  double read_disk(storage::DirectReader* reader, uint64_t SourceCounters::*counted) {
    ::posix_fadvise(file.get(), 0, 0, POSIX_FADV_DONTNEED);
    return read({.direct = reader}, counted);
  }

  uint64_t size_bytes = 0;
  int thread_count = 1;
  std::optional<memory::Segment> source, target;  // there once it is prepared
  base::Fd file;
  base::FileIdentity identity;
  std::unique_ptr<storage::ReadPool> pool;
  std::unique_ptr<storage::DirectReader> direct;
};

struct Measurement {
  const char* name;
  double (*run)(Bench& bench);
};

constexpr Measurement kMeasurements[] = {
    {"memcpy_1", [](Bench& bench) { return bench.copy(1, kMiB, kMiB); }},
    {"memcpy_all", [](Bench& bench) { return bench.copy(0, kMiB, kMiB); }},
    {"gather_all", [](Bench& bench) { return bench.copy(0, 4 << 10, 8 << 10); }},
    {"fresh_4k", [](Bench& bench) { return bench.touch(HugePages::unwanted); }},
    {"fresh_huge", [](Bench& bench) { return bench.touch(HugePages::wanted); }},
    {"cache_pread", [](Bench& bench) { return bench.read_cached(CachedPath::plain); }},
    {"cache_stream", [](Bench& bench) { return bench.read_cached(CachedPath::stream); }},
    {"cache_mapped", [](Bench& bench) { return bench.read_cached(CachedPath::mapped); }},
    {"disk_direct", [](Bench& bench) { return bench.read_disk(bench.direct.get(), &SourceCounters::direct_bytes); }},
    {"disk_buffered", [](Bench& bench) { return bench.read_disk(nullptr, &SourceCounters::buffered_bytes); }},
};

base::Status open_file(const std::string& path, Bench& bench) {
  std::string name = path + "/tensord-doctor.XXXXXX";
  bench.file.reset(::mkostemp(name.data(), O_CLOEXEC));
  const bool scratch = bench.file.valid();
  if (scratch) ::unlink(name.c_str());
  if (!scratch && errno == ENOTDIR) bench.file.reset(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!bench.file.valid()) return tl::unexpected(base::errno_error("measure the disk of " + path, errno));
  for (uint64_t at = 0; scratch && at < bench.size_bytes; at += kReadBytes) {
    const std::byte* from = bench.source->data() + at;
    if (::pwrite(bench.file.get(), from, kReadBytes, static_cast<off_t>(at)) != ssize_t{kReadBytes})
      return tl::unexpected(base::errno_error("write a scratch file in " + path, errno));
  }
  if (scratch) ::fdatasync(bench.file.get());  // else its pages cannot be dropped from the cache
  TRY_ASSIGN(bench.identity, base::identify_file(bench.file.get(), path));
  if (bench.identity.size_bytes >= bench.size_bytes) return {};
  return base::fail(base::Code::invalid_argument,
                    base::text(path, " is too small: ", base::human_bytes(bench.size_bytes), " are needed"));
}

base::Status prepare(const std::string& path, uint64_t size_bytes, Bench& bench) {
  bench.size_bytes = std::bit_floor(std::min(size_bytes, default_host_memory() / kMemoryShare));
  if (bench.size_bytes < kReadBytes)
    return base::fail(base::Code::exhausted, "64 MiB of memory are too little to measure");
  bench.thread_count = memory::usable_core_count();
  for (auto* segment : {&bench.source, &bench.target}) {
    TRY_ASSIGN(*segment, memory::make_segment(bench.size_bytes, ::getuid()));
    memory::FreshPages({&**segment, 1}, bench.size_bytes, HugePages::wanted).prepare(0, bench.size_bytes);
  }
  TRY_ASSIGN(bench.pool, storage::start_read_pool(std::min(bench.thread_count, kReadsAtOnce)));
  auto ring = storage::start_uring_reader();
  if (!ring) ring = storage::start_pread_reader();
  if (!ring) return base::pass_on(ring);
  bench.direct = std::move(*ring);
  uint64_t state = 0x9e3779b97f4a7c15;
  for (uint64_t at = 0; at < bench.size_bytes; at += sizeof state) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;  // xorshift64: no disk can squeeze it
    std::memcpy(bench.source->data() + at, &state, sizeof state);
  }
  std::memset(bench.target->data(), 1, bench.size_bytes);
  return open_file(path, bench);
}

}  // namespace

Result<Rates> measure(const std::string& path, const Effort& effort) {
  Bench bench;
  TRY(prepare(path, effort.size_bytes, bench));
  std::vector<double> runs[std::size(kMeasurements)];
  const int64_t end_ns = base::monotonic_ns() + kTotalNs;
  for (int round = 0; round < effort.round_count && base::monotonic_ns() < end_ns; ++round) {
    for (size_t at = 0; at < std::size(kMeasurements); ++at) runs[at].push_back(kMeasurements[at].run(bench));
  }
  Rates rates;
  for (size_t at = 0; at < std::size(kMeasurements); ++at) {
    std::sort(runs[at].begin(), runs[at].end());
    rates.bytes_per_s[kMeasurements[at].name] = runs[at][runs[at].size() / 2];
  }
  return rates;
}

}  // namespace tensord::doctor
