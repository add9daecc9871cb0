// Measures rates. Every run takes about a tenth of a second; rounds of all of them are made until there are enough or
// the time is up, so that a burst of somebody else's work meets one run of each and not all of one.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/fd.h"
#include "base/stream_copy.h"
#include "base/text.h"
#include "daemon/doctor.h"
#include "tensor/digest.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace tensord::daemon {

using base::kMiB;
using base::Result;

namespace {

constexpr uint64_t kHugeBytes = 2 * kMiB;
constexpr uint64_t kScratchBytes = 512 * kMiB;
constexpr uint64_t kDirectBytes = 4 * kMiB;  // of one O_DIRECT read
constexpr uint64_t kStageBytes = 256 << 10;  // stays in the second-level cache
constexpr int64_t kDiskRunNs = 600'000'000;  // a slow disk is read for so long, not to the end
constexpr int64_t kTotalNs = 12'000'000'000;
constexpr int kRoundCount = 5;

// Shared memory on an address that huge pages can have.
class Memory {
 public:
  static Result<Memory> make(uint64_t size_bytes) {
    const base::Fd fd(::memfd_create("tensord-doctor", MFD_CLOEXEC));
    if (!fd.valid() || ::ftruncate(fd.get(), static_cast<off_t>(size_bytes)) != 0) {
      return tl::unexpected(base::errno_error("create memory to measure with", errno));
    }
    void* range = ::mmap(nullptr, size_bytes + kHugeBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (range == MAP_FAILED) return tl::unexpected(base::errno_error("reserve addresses", errno));
    Memory memory(range, size_bytes);
    if (::mmap(memory.data(), size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd.get(), 0) ==
        MAP_FAILED) {
      return tl::unexpected(base::errno_error("map memory to measure with", errno));
    }
    return memory;
  }
  Memory(Memory&& other) noexcept
      : range_(std::exchange(other.range_, nullptr)), size_bytes_(other.size_bytes_) {}
  ~Memory() {
    if (range_ != nullptr) ::munmap(range_, size_bytes_ + kHugeBytes);
  }
  std::byte* data() const {
    return reinterpret_cast<std::byte*>(base::align_up(reinterpret_cast<uint64_t>(range_), kHugeBytes));
  }

 private:
  Memory(void* range, uint64_t size_bytes) : range_(range), size_bytes_(size_bytes) {}
  void* range_;
  uint64_t size_bytes_;
};

// A file to read: a scratch file that has no name, so that nothing of it is left however this process ends.
struct Disk {
  base::Fd buffered, direct;  // direct is not valid where the file system refuses O_DIRECT
  uint64_t size_bytes = 0;
};

Result<Disk> open_disk(const MeasureOptions& options, const std::byte* random, uint64_t random_bytes) {
  Disk disk;
  if (!options.file.empty()) {
    disk.buffered.reset(::open(options.file.c_str(), O_RDONLY | O_CLOEXEC));
    if (!disk.buffered.valid()) return tl::unexpected(base::errno_error("open " + options.file, errno));
    TRY_ASSIGN(const base::FileIdentity identity, base::identify_file(disk.buffered.get(), options.file));
    disk.size_bytes = base::align_down(std::min(identity.size_bytes, kScratchBytes), kMiB);
  } else {
    const std::string what = "make a scratch file in " + options.folder;
    disk.buffered.reset(::open(options.folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
    if (!disk.buffered.valid()) {
      std::string name = options.folder + "/doctor.XXXXXX";
      disk.buffered.reset(::mkostemp(name.data(), O_CLOEXEC));
      if (disk.buffered.valid()) ::unlink(name.c_str());
    }
    if (!disk.buffered.valid()) return tl::unexpected(base::errno_error(what, errno));
    const uint64_t wanted = options.quick ? 32 * kMiB : kScratchBytes;
    const int64_t end_ns = base::monotonic_ns() + 5 * kDiskRunNs;
    for (; disk.size_bytes < wanted && base::monotonic_ns() < end_ns; disk.size_bytes += kDirectBytes) {
      const std::byte* part = random + disk.size_bytes % base::align_down(random_bytes, kDirectBytes);
      const auto at = static_cast<off_t>(disk.size_bytes);
      if (::pwrite(disk.buffered.get(), part, kDirectBytes, at) != static_cast<ssize_t>(kDirectBytes)) break;
    }
    ::fdatasync(disk.buffered.get());  // else its pages cannot be dropped from the cache
  }
  if (disk.size_bytes == 0) return base::fail(base::Code::exhausted, "no 4 MiB to read from the disk");
  const std::string path = base::text("/proc/self/fd/", disk.buffered.get());
  disk.direct.reset(::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
  return disk;
}

class Bench {
 public:
  Bench(Memory source, Memory target, uint64_t size_bytes, Disk disk, int threads)
      : source_(std::move(source)),
        target_(std::move(target)),
        size_bytes_(size_bytes),
        disk_(std::move(disk)),
        threads_(threads) {}

  double run(double MachineRates::*rate) {
    if (rate == &MachineRates::memcpy_1) return copied(1);
    if (rate == &MachineRates::memcpy_all) return copied(threads_);
    if (rate == &MachineRates::gather_all) return gathered();
    if (rate == &MachineRates::fresh_4k) return touched(false);
    if (rate == &MachineRates::fresh_huge) return touched(true);
    if (rate == &MachineRates::cache_pread) return read_cached(false);
    if (rate == &MachineRates::cache_stream) return base::can_stream() ? read_cached(true) : 0;
    if (rate == &MachineRates::disk_direct) return read_disk(disk_.direct, kDirectBytes);
    if (rate == &MachineRates::disk_buffered) return drop_cache() ? read_disk(disk_.buffered, kMiB) : 0;
    return hashed();
  }

  // 0 where the kernel gives no huge pages.
  double touched(bool huge) {
    auto fresh = Memory::make(size_bytes_);
    if (!fresh) return 0;
    std::atomic<int> failures{0};
    const double rate = in_pieces(threads_, size_bytes_, kHugeBytes, [&](int, uint64_t at, uint64_t size) {
      std::byte* const piece = fresh->data() + at;
      *piece = std::byte{1};  // a range without any page is refused
      if (huge && ::madvise(piece, size, MADV_COLLAPSE) != 0) ++failures;
      for (uint64_t page = 0; page < size && !huge; page += 4096) piece[page] = std::byte{1};
    });
    return failures > 0 ? 0 : rate;
  }

 private:
  // Bytes a second of `work(thread, at, size)` over [0, size_bytes), in pieces that threads take in turn.
  template <typename Work>
  static double in_pieces(int thread_count, uint64_t size_bytes, uint64_t piece_bytes, const Work& work,
                          int64_t run_ns = INT64_MAX / 2) {
    std::atomic<uint64_t> next{0}, done{0};
    const int64_t begin_ns = base::monotonic_ns();
    const auto body = [&](int thread) {
      while (base::monotonic_ns() - begin_ns < run_ns) {
        const uint64_t at = next.fetch_add(piece_bytes);
        if (at >= size_bytes) return;
        const uint64_t size = std::min(piece_bytes, size_bytes - at);
        work(thread, at, size);
        done += size;
      }
    };
    std::vector<std::thread> threads;
    for (int thread = 1; thread < thread_count; ++thread) threads.emplace_back(body, thread);
    body(0);
    for (std::thread& thread : threads) thread.join();
    return static_cast<double>(done) * 1e9 /
           static_cast<double>(std::max<int64_t>(base::monotonic_ns() - begin_ns, 1));
  }

  double copied(int thread_count) {
    return in_pieces(thread_count, size_bytes_, kMiB, [&](int, uint64_t at, uint64_t size) {
      std::memcpy(target_.data() + at, source_.data() + at, size);
    });
  }

  double gathered() {
    constexpr uint64_t kRowBytes = 5 << 10;
    return in_pieces(threads_, size_bytes_ / 2, 200 * kRowBytes, [&](int, uint64_t at, uint64_t size) {
      for (uint64_t row = at; row + kRowBytes <= at + size; row += kRowBytes) {
        std::memcpy(target_.data() + row, source_.data() + 2 * row, kRowBytes);
      }
    });
  }

  double hashed() {
    return in_pieces(1, size_bytes_, kMiB, [&](int, uint64_t at, uint64_t size) {
      tensor::hash({source_.data() + at, size});
    });
  }

  // Bytes that were not read count for nothing: the rate of a file that fails is 0.
  double read_cached(bool streamed) {
    const uint64_t size_bytes = std::min(size_bytes_, disk_.size_bytes);
    const int fd = disk_.buffered.get();
    const auto plain = [&](int, uint64_t at, uint64_t size) {
      if (::pread(fd, target_.data() + at, size, static_cast<off_t>(at)) < 0) return;
    };
    in_pieces(threads_, size_bytes, kMiB, plain);  // now it is cached
    if (!streamed) return in_pieces(threads_, size_bytes, kMiB, plain);
    std::vector<std::vector<std::byte>> stages(static_cast<size_t>(threads_),
                                               std::vector<std::byte>(kStageBytes));
    return in_pieces(threads_, size_bytes, kStageBytes, [&](int thread, uint64_t at, uint64_t size) {
      std::byte* const stage = stages[static_cast<size_t>(thread)].data();
      if (::pread(fd, stage, size, static_cast<off_t>(at)) != static_cast<ssize_t>(size)) return;
      base::stream_rows({stage, target_.data() + at, size, 1, 0, 0});
    });
  }

  double read_disk(const base::Fd& fd, uint64_t piece_bytes) {
    if (!fd.valid()) return 0;
    const uint64_t wrap = base::align_down(size_bytes_, piece_bytes);
    std::atomic<bool> failed{false};
    const double rate = in_pieces(
        std::clamp(threads_, 4, 16), base::align_down(disk_.size_bytes, piece_bytes), piece_bytes,
        [&](int, uint64_t at, uint64_t size) {
          if (::pread(fd.get(), target_.data() + at % wrap, size, static_cast<off_t>(at)) <= 0) failed = true;
        },
        kDiskRunNs);
    return failed ? 0 : rate;
  }

  // False where the file stays cached: tmpfs, or pages that somebody else maps.
  bool drop_cache() {
    ::posix_fadvise(disk_.buffered.get(), 0, 0, POSIX_FADV_DONTNEED);
    void* const map = ::mmap(nullptr, disk_.size_bytes, PROT_READ, MAP_SHARED, disk_.buffered.get(), 0);
    if (map == MAP_FAILED) return false;
    std::vector<unsigned char> pages((disk_.size_bytes + 4095) / 4096);
    const bool known = ::mincore(map, disk_.size_bytes, pages.data()) == 0;
    ::munmap(map, disk_.size_bytes);
    const auto cached =
        std::count_if(pages.begin(), pages.end(), [](unsigned char page) { return (page & 1) != 0; });
    return known && static_cast<size_t>(cached) < pages.size() / 50;
  }

  const Memory source_, target_;
  const uint64_t size_bytes_;
  const Disk disk_;
  const int threads_;
};

}  // namespace

Result<Measured> measure(const MeasureOptions& options) {
  // Source, target, fresh memory, and the cached file.
  const uint64_t wanted = options.quick ? 16 * kMiB : 256 * kMiB;
  const uint64_t size_bytes = base::align_down(std::min(wanted, options.memory_bytes / 6), kDirectBytes);
  if (size_bytes == 0)
    return base::fail(base::Code::exhausted, "not even 24 MiB of memory are free to measure with");
  TRY_ASSIGN(Memory source, Memory::make(size_bytes));
  TRY_ASSIGN(Memory target, Memory::make(size_bytes));
  uint64_t state = 0x9e3779b97f4a7c15;
  for (uint64_t at = 0; at < size_bytes;
       at += sizeof state) {  // xorshift64: no disk or hypervisor squeezes it
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    std::memcpy(source.data() + at, &state, sizeof state);
  }
  std::memset(target.data(), 1, size_bytes);
  TRY_ASSIGN(Disk disk, open_disk(options, source.data(), size_bytes));
  const bool is_direct = disk.direct.valid();
  Bench bench(std::move(source), std::move(target), size_bytes, std::move(disk), this_machine().core_count);
  const auto rates = named_rates();
  const int round_count = options.quick ? 1 : kRoundCount;
  std::vector<std::vector<double>> runs(rates.size());
  const int64_t begin_ns = base::monotonic_ns();
  for (int round = 0; round < round_count; ++round) {
    for (size_t at = 0; at < rates.size(); ++at) {
      if (options.on_progress) {
        options.on_progress((round + static_cast<double>(at) / static_cast<double>(rates.size())) /
                            round_count);
      }
      runs[at].push_back(bench.run(rates[at].rate));
    }
    if (base::monotonic_ns() - begin_ns > kTotalNs * (round + 1) / (round + 2))
      break;  // the next would end too late
  }
  Measured measured;
  for (size_t at = 0; at < rates.size(); ++at) {
    std::sort(runs[at].begin(), runs[at].end());
    measured.rates.*rates[at].rate = runs[at][runs[at].size() / 2];
  }
  if (size_bytes < wanted)
    measured.notes.push_back("memory is short: measured with " + base::human_bytes(size_bytes));
  if (!is_direct) measured.notes.push_back("the file system refuses O_DIRECT");
  if (measured.rates.disk_buffered == 0)
    measured.notes.push_back("the file stays in memory: its disk cannot be measured");
  return measured;
}

}  // namespace tensord::daemon
