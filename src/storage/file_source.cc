#include "storage/file_source.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "base/text.h"
#include "storage/file_map.h"
#include "storage/residency.h"

namespace tensord::storage {

using base::Code;
using base::MutexLock;
using base::text;

namespace {

// Errors of a direct read that say nothing of the disk: this file, or this system, has no such way.
bool is_refusal(int error) {
  static constexpr int kRefusals[] = {EINVAL, EOPNOTSUPP, ENOSYS, EAGAIN, EBUSY, ENOMEM, ECANCELED};
  return std::find(std::begin(kRefusals), std::end(kRefusals), error) != std::end(kRefusals);
}

// Another descriptor of the same file, for O_DIRECT.
Result<base::Fd> open_direct(const SourceFile& file) {
  const std::string link = text("/proc/self/fd/", file.fd.get());
  base::Fd fd(::open(link.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT));
  if (!fd.valid()) return base::fail_errno(errno, file.path, ": no O_DIRECT");
  struct statx status;
  if (::statx(fd.get(), "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 && (status.stx_mask & STATX_DIOALIGN) != 0) {
    const uint32_t asked = std::max(status.stx_dio_mem_align, status.stx_dio_offset_align);
    if (status.stx_dio_offset_align == 0 || asked > kDirectAlignment) {
      return fail(Code::unsupported, file.path, ": no O_DIRECT: the file system wants blocks of ", asked,
                  " bytes (0: refuses it)");
    }
  }
  return fd;
}

class FileSource final : public Source {
 public:
  FileSource(std::vector<SourceFile> files, ReadPool& pool, FileSourceOptions options)
      : pool_(pool), options_(std::move(options)) {
    for (SourceFile& file : files) files_.push_back(std::make_unique<File>(std::move(file)));
    if (!options_.direct_note.empty()) notes_.push_back(options_.direct_note);
    if (options_.cached_path == CachedPath::mapped) notes_.push_back("cached bytes come from a mapping of the file");
  }

  ~FileSource() override {
    cancel();
    {
      MutexLock lock(mutex_);
      while (in_flight_count_ > 0) lock.wait(none_in_flight_);
    }
    // What the kernel read ahead after its part was dropped.
    for (const auto& file : files_) {
      if (options_.cache_left == CacheLeft::drop) ::posix_fadvise(file->source.fd.get(), 0, 0, POSIX_FADV_DONTNEED);
    }
  }

  void read(ReadRequest request) override {
    CHECK(request.file < files_.size());
    auto job = std::make_shared<Job>(std::move(request));
    {
      MutexLock lock(mutex_);
      ++in_flight_count_;
      if (!cancelled_) {
        // Under the lock, so that cancel() finds in the pool whatever did not see its flag.
        pool_.post(this, [this, job] { begin(job); });
        return;
      }
    }
    begin(job);
  }

  void cancel() override {
    {
      MutexLock lock(mutex_);
      cancelled_ = true;
    }
    for (const ReadPool::Work& work : pool_.withdraw(this)) work();
  }

  Status check_unchanged(uint32_t file) override {
    CHECK(file < files_.size());
    const SourceFile& source = files_[file]->source;
    return base::check_unchanged(source.fd.get(), source.identity, source.path);
  }

  SourceCounters counters() const override {
    return {read_count_, read_bytes_, cached_bytes_, direct_bytes_, buffered_bytes_};
  }

  std::string read_path() const override {
    const bool direct =
        std::any_of(files_.begin(), files_.end(), [](const auto& file) { return file->takes_direct.load(); });
    return direct ? text(options_.direct->name(), ", O_DIRECT") : "page cache";
  }

  std::vector<std::string> notes() const override {
    MutexLock lock(mutex_);
    return notes_;
  }

 private:
  struct File {
    explicit File(SourceFile file) : source(std::move(file)) {}
    const SourceFile source;
    std::once_flag opened;
    base::Fd direct;  // these two are constant once opened
    std::optional<FileMap> map;
    std::atomic<bool> takes_direct{false};
  };
  // A read under way. Its parts come one after another, each on some thread.
  struct Job {
    explicit Job(ReadRequest asked) : request(std::move(asked)) {}
    ReadRequest request;
    int64_t begin_ns = 0;
    size_t filled = 0;
    uint64_t offset() const { return request.offset + filled; }
    std::byte* target() const { return request.target.data() + filled; }
  };
  struct Part {
    enum class Way { cached, buffered, direct } way = Way::buffered;
    size_t size_bytes = 0;
  };

  std::string place(const Job& job) const {
    return text("read ", files_[job.request.file]->source.path, " at ", job.offset());
  }

  void begin(const std::shared_ptr<Job>& job) {
    job->begin_ns = base::monotonic_ns();
    const ReadRequest& request = job->request;
    File& file = *files_[request.file];
    const uint64_t size_bytes = file.source.identity.size_bytes;
    if (cancelled_) return finish(*job, cancelled(*job));
    if (request.offset > size_bytes || request.target.size() > size_bytes - request.offset) {
      return finish(*job, fail(Code::corrupt, place(*job), ": ", request.target.size(),
                               " bytes are needed, the file has ", size_bytes, " in all"));
    }
    std::call_once(file.opened, [&] { prepare(file); });
    if (request.begin) request.begin();
    advance(job);
  }

  void prepare(File& file) {
    if (options_.cached_path == CachedPath::mapped) {
      file.map.emplace(file.source.fd.get(), file.source.identity.size_bytes);
    }
    if (options_.direct == nullptr || file.source.identity.size_bytes < kDirectBytesMin) return;
    auto direct = open_direct(file.source);
    if (!direct) return note(direct.error().message + "; it is read through the page cache");
    file.direct = std::move(*direct);
    file.takes_direct = true;
    // Through the page cache come only the odd ends: reading ahead of them would read twice.
    ::posix_fadvise(file.source.fd.get(), 0, 0, POSIX_FADV_RANDOM);
  }

  // Goes on until the job is done or waits for a direct read.
  void advance(const std::shared_ptr<Job>& job) {
    while (true) {
      if (cancelled_) return finish(*job, cancelled(*job));
      if (job->filled == job->request.target.size()) return finish(*job, {});
      const Part part = next_part(*job);
      if (part.way == Part::Way::direct) return read_direct(job, part.size_bytes);
      if (Status status = read_cached(*job, part); !status) return finish(*job, std::move(status));
    }
  }

  Part next_part(const Job& job) const {
    const File& file = *files_[job.request.file];
    const uint64_t begin = job.offset();
    const uint64_t end = job.request.offset + job.request.target.size();
    const auto stretch_end = [end](uint64_t from) { return std::min(end, base::align_up(from + 1, kStretchBytes)); };
    uint64_t stop = stretch_end(begin);
    const bool cached = is_cached(file.source.fd.get(), begin, stop - begin);
    while (stop < end && is_cached(file.source.fd.get(), stop, stretch_end(stop) - stop) == cached) {
      stop = stretch_end(stop);
    }
    if (cached) return {Part::Way::cached, stop - begin};
    const uint64_t first = base::align_up(begin, kDirectAlignment);
    const uint64_t last = stop / kDirectAlignment * kDirectAlignment;
    const bool alike = reinterpret_cast<uint64_t>(job.target()) % kDirectAlignment == begin % kDirectAlignment;
    if (!file.takes_direct || !alike || last < first + kDirectBytesMin) return {Part::Way::buffered, stop - begin};
    if (first > begin) return {Part::Way::buffered, first - begin};
    return {Part::Way::direct, last - begin};
  }

  Status read_cached(Job& job, const Part& part) {
    const size_t end = job.filled + part.size_bytes;
    const uint64_t begin_offset = job.offset();
    while (job.filled < end) {
      if (cancelled_) return cancelled(job);
      const size_t size_bytes = end - job.filled;
      // What is not cached is read ahead better by pread than by faults.
      const auto& map = files_[job.request.file]->map;
      const bool mapped = part.way == Part::Way::cached && map && map->valid();
      TRY(mapped                                      ? map_piece(job, size_bytes)
          : options_.cached_path == CachedPath::plain ? fill_piece(job, size_bytes)
                                                      : stream_piece(job, size_bytes));
    }
    (part.way == Part::Way::cached ? cached_bytes_ : buffered_bytes_) += part.size_bytes;
    if (options_.cache_left == CacheLeft::drop) {
      ::posix_fadvise(files_[job.request.file]->source.fd.get(), static_cast<off_t>(begin_offset),
                      static_cast<off_t>(part.size_bytes), POSIX_FADV_DONTNEED);
    }
    return {};
  }

  // Some bytes from the page cache, at most `size_bytes`; 0 after an interruption.
  Result<size_t> pread_some(const Job& job, std::byte* into, size_t size_bytes) {
    const SourceFile& file = files_[job.request.file]->source;
    const ssize_t got = options_.pread(file.fd.get(), into, size_bytes, static_cast<off_t>(job.offset()));
    const int error = errno;
    if (got < 0 && (error == EINTR || error == EAGAIN)) return size_t{0};
    if (got < 0) return base::fail_errno(error, place(job));
    if (got == 0) return base::pass_on(ends_early(job));
    if (static_cast<size_t>(got) > size_bytes) {
      return fail(Code::internal, place(job), ": the system returned ", got, " bytes for ", size_bytes, " asked for");
    }
    return static_cast<size_t>(got);
  }

  Status ends_early(const Job& job) const {
    return fail(Code::corrupt, place(job), ": the file ends ", job.request.target.size() - job.filled,
                " bytes early; was it cut short?");
  }
  Status cancelled(const Job& job) const { return fail(Code::cancelled, place(job), ": cancelled"); }

  Status fill_piece(Job& job, size_t size_bytes) {
    const size_t wanted = std::min(size_bytes, job.request.piece ? kPieceBytes : kReadBytesMax);
    TRY_ASSIGN(const size_t got, pread_some(job, job.target(), wanted));
    if (job.request.piece && got > 0) job.request.piece(job.filled, {job.target(), got});
    job.filled += got;
    return {};
  }

  Status stream_piece(Job& job, size_t size_bytes) {
    thread_local std::vector<std::byte> hot(kPieceBytes);
    TRY_ASSIGN(const size_t got, pread_some(job, hot.data(), std::min(size_bytes, kPieceBytes)));
    stream_on(job, std::span(hot).first(got));
    return {};
  }

  Status map_piece(Job& job, size_t size_bytes) {
    File& file = *files_[job.request.file];
    const size_t wanted = std::min(size_bytes, kMappedBytes - job.offset() % kMappedBytes);
    const std::string where = place(job);
    if (file.map->read_range(job.offset(), wanted, [&](auto bytes) { stream_on(job, bytes); })) return {};
    TRY(check_unchanged(job.request.file));
    return fail(Code::unavailable, where, ": the system could not bring its pages; is the disk failing?");
  }

  static void stream_on(Job& job, std::span<const std::byte> bytes) {
    for (size_t at = 0; at < bytes.size(); at += kHotBytes) {
      const auto hot = bytes.subspan(at, std::min(kHotBytes, bytes.size() - at));
      if (job.request.piece) job.request.piece(job.filled + at, hot);
      base::stream_rows({hot.data(), job.target() + at, hot.size(), 1, 0, 0});
    }
    base::end_streaming();
    job.filled += bytes.size();
  }

  void read_direct(const std::shared_ptr<Job>& job, size_t size_bytes) {
    const size_t wanted = std::min(size_bytes, kReadBytesMax / kDirectAlignment * kDirectAlignment);
    options_.direct->read(files_[job->request.file]->direct.get(), job->target(), wanted, job->offset(),
                          [this, job, wanted](int64_t result) {
                            pool_.post(this, [this, job, wanted, result] { directed(job, wanted, result); });
                          });
  }

  void directed(const std::shared_ptr<Job>& job, size_t wanted, int64_t result) {
    if (result == -EINTR) return advance(job);
    if (result == 0) return finish(*job, ends_early(*job));
    if (result < 0 && !is_refusal(static_cast<int>(-result))) {
      return finish(*job, base::fail_errno(static_cast<int>(-result), place(*job)));
    }
    // A count that is no multiple of blocks is the end of a file that was cut, or a device with smaller ones.
    const size_t got =
        result < 0 ? 0 : std::min(static_cast<size_t>(result), wanted) / kDirectAlignment * kDirectAlignment;
    if (got == 0) give_up_direct(*job, result);
    if (got > 0 && job->request.piece) job->request.piece(job->filled, {job->target(), got});
    job->filled += got;
    direct_bytes_ += got;
    advance(job);
  }

  void give_up_direct(const Job& job, int64_t result) {
    File& file = *files_[job.request.file];
    if (!file.takes_direct.exchange(false)) return;
    ::posix_fadvise(file.source.fd.get(), 0, 0, POSIX_FADV_NORMAL);
    const std::string why =
        result < 0 ? base::errno_error("", static_cast<int>(-result)).message : text(": only ", result, " bytes came");
    note(text(place(job), " by ", options_.direct->name(), why,
              "; the rest of the file is read through the page cache"));
  }

  void note(std::string line) {
    MutexLock lock(mutex_);
    notes_.push_back(std::move(line));
  }

  void finish(Job& job, Status status) {
    const ReadTiming timing{job.begin_ns, base::monotonic_ns()};
    if (status) {
      ++read_count_;
      read_bytes_ += job.request.target.size();
    }
    job.request.begin = nullptr;  // what the functions captured goes before the source may
    job.request.piece = nullptr;
    std::exchange(job.request.done, nullptr)(std::move(status), timing);
    MutexLock lock(mutex_);
    if (--in_flight_count_ == 0) none_in_flight_.notify_all();
  }

  std::vector<std::unique_ptr<File>> files_;  // constant after construction
  ReadPool& pool_;
  const FileSourceOptions options_;
  std::atomic<uint64_t> read_count_ = 0;
  std::atomic<uint64_t> read_bytes_ = 0;
  std::atomic<uint64_t> cached_bytes_ = 0;
  std::atomic<uint64_t> direct_bytes_ = 0;
  std::atomic<uint64_t> buffered_bytes_ = 0;
  std::atomic<bool> cancelled_ = false;  // set under mutex_
  mutable base::Mutex mutex_;
  std::condition_variable none_in_flight_;
  size_t in_flight_count_ GUARDED_BY(mutex_) = 0;
  std::vector<std::string> notes_ GUARDED_BY(mutex_);
};

}  // namespace

std::unique_ptr<Source> make_file_source(std::vector<SourceFile> files, ReadPool& pool, FileSourceOptions options) {
  return std::make_unique<FileSource>(std::move(files), pool, std::move(options));
}

}  // namespace tensord::storage
