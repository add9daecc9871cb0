#include "bench/raw_reader.h"

#include <fcntl.h>
#include <liburing.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>

#include "base/bytes.h"
#include "base/fd.h"
#include "base/text.h"
#include "bench/checkpoint.h"
#include "bench/gather.h"
#include "tensor/digest.h"

namespace tensord::bench {

using base::Code;
using base::kKiB;
using base::kMiB;

namespace {

constexpr uint64_t kPageBytes = 4096, kHugeBytes = 2 * kMiB;
constexpr uint64_t kBounceBytes = 256 * kKiB;
constexpr uint64_t kPieces[] = {256 * kKiB, kMiB, 4 * kMiB, 16 * kMiB};
constexpr int kDepthMax = 32;
constexpr uint64_t kRegisteredMax = base::kGiB;  // the kernel's limit for one buffer
constexpr uint64_t kTrialBytes = 512 * kMiB;     // depth 32 of 16 MiB

Status failed_read(const std::string& path, int error) {
  return tl::unexpected(base::errno_error("read " + path, error));
}

}  // namespace

Status drop_cache(const std::string& path) {
  constexpr int kTries = 100;  // reads ahead that are still under way keep their pages
  const base::Fd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file.valid()) return failed_read(path, errno);
  TRY_ASSIGN(const memory::Mapped mapping, map_file(path));
  std::vector<unsigned char> resident(base::align_up(mapping.size_bytes(), kPageBytes) / kPageBytes);
  std::ptrdiff_t left = 1;
  for (int at = 0; at < kTries && left > 0; ++at) {
    if (at > 0) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    ::posix_fadvise(file.get(), 0, 0, POSIX_FADV_DONTNEED);
    ::mincore(mapping.data(), mapping.size_bytes(), resident.data());
    left = std::count_if(resident.begin(), resident.end(), [](auto page) { return page & 1; });
  }
  if (left == 0) return {};
  return base::fail(Code::unsupported, base::text(path, ": ", left, " pages stay in the page cache"));
}

Result<memory::Mapped> make_shared(uint64_t size_bytes, Pages pages) {
  const base::Fd fd(::memfd_create("bench", MFD_CLOEXEC));
  size_bytes = base::align_up(size_bytes, kHugeBytes);
  if (::ftruncate(fd.get(), static_cast<off_t>(size_bytes)) != 0) {
    return tl::unexpected(base::errno_error("make memory for the ceiling", errno));
  }
  void* data = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (data == MAP_FAILED) return tl::unexpected(base::errno_error("map memory for the ceiling", errno));
  memory::Mapped memory(static_cast<std::byte*>(data), size_bytes);
  std::memset(data, 1, size_bytes);
#ifndef MADV_COLLAPSE
  constexpr int MADV_COLLAPSE = 25;
#endif
  if (pages == Pages::huge && ::madvise(data, size_bytes, MADV_COLLAPSE) != 0) {
    return base::fail(Code::unsupported, "no huge pages for the ceiling");
  }
  return memory;
}

// ---- hot ---------------------------------------------------------------------------------------------------

Result<HotReader> HotReader::make(const std::string& path, int thread_count, uint64_t memory_bytes) {
  HotReader reader;
  reader.path_ = path;
  reader.thread_count_ = thread_count;
  reader.file_.reset(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  TRY_ASSIGN(const base::FileIdentity identity, base::identify_file(reader.file_.get(), path));
  reader.size_bytes_ = identity.size_bytes;
  const uint64_t bytes = std::min(base::align_up(identity.size_bytes, 16 * kMiB), memory_bytes);
  TRY_ASSIGN(reader.memory_, make_shared(bytes, Pages::small));
  return reader;
}

template <typename Read>
Sample HotReader::each_piece(uint64_t piece_bytes, const Read& read) const {
  std::atomic<uint64_t> next{0};
  return run_on_threads(thread_count_, [&] {
    for (uint64_t at; (at = next.fetch_add(piece_bytes)) < size_bytes_;)
      read(at, std::min(piece_bytes, size_bytes_ - at), memory_.data() + at % memory_.size_bytes());
  });
}

Result<Sample> HotReader::read_straight(uint64_t piece_bytes) const {
  std::atomic<bool> failed{false};
  const Sample sample = each_piece(piece_bytes, [&](uint64_t at, uint64_t count, std::byte* target) {
    if (!base::read_exactly(file_.get(), at, {target, count}, path_)) failed = true;
  });
  if (failed) return base::fail(Code::unavailable, "read " + path_);
  return sample;
}

Result<Sample> HotReader::read_bounced(Hash hash) const {
  std::atomic<bool> failed{false};
  std::atomic<unsigned> all_digests{0};  // so that nobody leaves the hashing out
  const Sample sample = each_piece(kBounceBytes, [&](uint64_t at, uint64_t count, std::byte* target) {
    alignas(64) static thread_local std::byte buffer[kBounceBytes];
    if (!base::read_exactly(file_.get(), at, {buffer, count}, path_)) failed = true;
    unsigned digests = 0;
    for (uint64_t page = 0; page < count; page += kPageBytes) {
      const uint64_t bytes = std::min(kPageBytes, count - page);
      if (hash == Hash::each_page) {
        digests += static_cast<unsigned>(tensor::hash({buffer + page, bytes}).bytes[0]);
      }
      stream(target + page, buffer + page, bytes);
    }
    all_digests += digests;
  });
  if (failed) return base::fail(Code::unavailable, "read " + path_);
  return sample;
}

Result<Sample> HotReader::read_mapping(By by) const {
  const Stopwatch stopwatch;
  TRY_ASSIGN(const memory::Mapped mapping, map_file(path_));
  each_piece(4 * kMiB, [&](uint64_t at, uint64_t count, std::byte* target) {
#ifdef MADV_POPULATE_READ
    ::madvise(mapping.data() + at, base::align_up(count, kPageBytes), MADV_POPULATE_READ);
#endif
    if (by == By::stream) {
      stream(target, mapping.data() + at, count);
    } else {
      std::memcpy(target, mapping.data() + at, count);
    }
  });
  return stopwatch.read();
}

std::vector<Contender> HotReader::ways() const {
  std::vector<Contender> ways;
  for (const uint64_t piece : kPieces) {
    ways.push_back({base::text("pread of ", piece / kKiB, " KiB"), [this, piece] { return read_straight(piece); }});
  }
  ways.push_back({"pread of 256 KiB, streamed on", [this] { return read_bounced(Hash::no); }});
  ways.push_back({"mapping, memcpy", [this] { return read_mapping(By::memcpy); }});
  ways.push_back({"mapping, streamed", [this] { return read_mapping(By::stream); }});
  return ways;
}

// ---- cold --------------------------------------------------------------------------------------------------

std::string DirectWay::text() const {
  return base::text(engine == Engine::uring ? "io_uring" : "pread threads", ", ", depth, " x ", block_bytes / kMiB,
                    " MiB, ", pages == Pages::huge ? "huge" : "4 KiB", " pages");
}

Result<std::unique_ptr<DirectReader>> DirectReader::make(const std::string& path) {
  std::unique_ptr<DirectReader> reader(new DirectReader);
  reader->path_ = path;
  reader->file_.reset(::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
  if (!reader->file_.valid()) {
    return base::fail(Code::unsupported, base::errno_error("open " + path + " past the page cache", errno).message);
  }
  TRY_ASSIGN(const base::FileIdentity identity, base::identify_file(reader->file_.get(), path));
  reader->size_bytes_ = identity.size_bytes;
  for (const Pages pages : {Pages::small, Pages::huge}) {
    const auto at = static_cast<size_t>(pages);
    auto memory = make_shared(identity.size_bytes, pages);
    if (!memory && pages == Pages::small) return base::pass_on(memory);
    if (!memory) continue;
    reader->memory_[at] = std::move(*memory);
    if (const Status ring = reader->open_ring(at); !ring)
      std::printf("  no io_uring for the ceiling: %s\n", ring.error().message.c_str());
  }
  return reader;
}

Status DirectReader::open_ring(size_t pages) {
  auto ring = std::make_unique<io_uring>();
  if (const int error = ::io_uring_queue_init(kDepthMax, ring.get(), 0); error < 0)
    return tl::unexpected(base::errno_error("make a ring", -error));
  rings_[pages] = std::move(ring);  // from here on the destructor ends it
  std::vector<iovec> buffers;
  const memory::Mapped& memory = memory_[pages];
  for (uint64_t at = 0; at < memory.size_bytes(); at += kRegisteredMax)
    buffers.push_back({memory.data() + at, std::min(kRegisteredMax, memory.size_bytes() - at)});
  const int error =
      ::io_uring_register_buffers(rings_[pages].get(), buffers.data(), static_cast<unsigned>(buffers.size()));
  if (error == 0) return {};
  ::io_uring_queue_exit(rings_[pages].get());
  rings_[pages].reset();
  return tl::unexpected(base::errno_error("register memory", -error));
}

DirectReader::~DirectReader() {
  for (auto& ring : rings_) {
    if (ring) ::io_uring_queue_exit(ring.get());
  }
}

Result<Sample> DirectReader::read(const DirectWay& way, uint64_t size_bytes) const {
  TRY(drop_cache(path_));
  return way.engine == DirectWay::Engine::uring ? read_by_uring(way, size_bytes) : read_by_threads(way, size_bytes);
}

Result<Sample> DirectReader::read_by_threads(const DirectWay& way, uint64_t size_bytes) const {
  const memory::Mapped& memory = memory_[static_cast<size_t>(way.pages)];
  std::atomic<uint64_t> next{0};
  std::atomic<int> error{0};
  const Sample sample = run_on_threads(way.depth, [&] {
    for (uint64_t at; (at = next.fetch_add(way.block_bytes)) < size_bytes;) {
      const uint64_t end = std::min(at + way.block_bytes, size_bytes);
      for (uint64_t done = at; done < end;) {
        const uint64_t count = base::align_up(end - done, kPageBytes);
        const ssize_t got = ::pread(file_.get(), memory.data() + done, count, static_cast<off_t>(done));
        if (got <= 0) error = got < 0 ? errno : EIO;
        if (got <= 0) return;
        done += static_cast<uint64_t>(got);
      }
    }
  });
  if (error != 0) return base::pass_on(failed_read(path_, error));
  return sample;
}

Result<Sample> DirectReader::read_by_uring(const DirectWay& way, uint64_t size_bytes) const {
  const auto pages = static_cast<size_t>(way.pages);
  io_uring* const ring = rings_[pages].get();
  const Stopwatch stopwatch;
  uint64_t next = 0, done = 0;
  int error = 0;
  const auto submit = [&](uint64_t at, uint64_t end) {
    io_uring_sqe* const entry = ::io_uring_get_sqe(ring);
    ::io_uring_prep_read_fixed(entry, file_.get(), memory_[pages].data() + at,
                               static_cast<unsigned>(base::align_up(end - at, kPageBytes)), at,
                               static_cast<int>(at / kRegisteredMax));
    ::io_uring_sqe_set_data64(entry, at);
  };
  const auto end_of = [&](uint64_t at) { return std::min((at / way.block_bytes + 1) * way.block_bytes, size_bytes); };
  int under_way = 0;
  while (under_way > 0 || (next < size_bytes && error == 0)) {
    for (; error == 0 && under_way < way.depth && next < size_bytes; ++under_way) {
      submit(next, end_of(next));
      next = end_of(next);
    }
    ::io_uring_submit_and_wait(ring, 1);
    io_uring_cqe* completion;
    while (::io_uring_peek_cqe(ring, &completion) == 0) {
      const uint64_t at = completion->user_data;
      const int got = completion->res;
      ::io_uring_cqe_seen(ring, completion);
      --under_way;
      if (got <= 0) {
        error = got < 0 ? -got : EIO;
      } else if (const uint64_t end = at + static_cast<uint64_t>(got); end < end_of(at) && error == 0) {
        submit(end, end_of(at));  // a short read goes on
        ++under_way;
      }
      done += got > 0 ? static_cast<uint64_t>(got) : 0;
    }
  }
  if (error != 0 || done < size_bytes) return base::pass_on(failed_read(path_, error));
  return stopwatch.read();
}

Result<std::vector<Contender>> DirectReader::fastest_ways(const Options& options, size_t count) const {
  std::vector<DirectWay> ways;
  for (const Pages pages : {Pages::small, Pages::huge}) {
    for (const auto engine : {DirectWay::Engine::pread, DirectWay::Engine::uring}) {
      if (memory_[static_cast<size_t>(pages)].data() == nullptr) continue;
      if (engine == DirectWay::Engine::uring && !rings_[static_cast<size_t>(pages)]) continue;
      for (const uint64_t block : {kMiB, 4 * kMiB, 16 * kMiB}) {
        for (int depth = 2; depth <= kDepthMax; depth *= 2) ways.push_back({engine, block, depth, pages});
      }
    }
  }
  std::vector<Contender> trials;
  const uint64_t trial_bytes = std::min(kTrialBytes, size_bytes_ / kPageBytes * kPageBytes);
  for (size_t at = 0; at < ways.size(); ++at) {
    trials.push_back({base::text(at), [this, way = ways[at], trial_bytes] { return read(way, trial_bytes); }});
  }
  TRY_ASSIGN(const auto best, fastest(std::move(trials), count, options.tiny ? 1 : 2));
  std::vector<Contender> acts;
  for (const Contender& one : best) {
    const DirectWay way = ways[std::stoul(one.name)];
    acts.push_back({way.text(), [this, way] { return read(way, size_bytes_); }});
  }
  return acts;
}

}  // namespace tensord::bench
