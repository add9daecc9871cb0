#include "storage/file_source.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "base/text.h"

namespace tensord::storage {

using base::Code;
using base::MutexLock;
using base::text;

namespace {

class FileSource final : public Source {
 public:
  FileSource(std::vector<SourceFile> files, ReadPool& pool, PreadFunction pread)
      : files_(std::move(files)), pool_(pool), pread_(std::move(pread)) {}

  ~FileSource() override {
    cancel();
    MutexLock lock(mutex_);
    while (in_flight_count_ > 0) lock.wait(none_in_flight_);
  }

  void read(ReadRequest request) override {
    CHECK(request.file < files_.size());
    {
      MutexLock lock(mutex_);
      ++in_flight_count_;
      if (!cancelled_) {
        // Under the lock, so that cancel() finds in the pool whatever did not see its flag.
        pool_.post(this, [this, request = std::move(request)]() mutable { run(std::move(request)); });
        return;
      }
    }
    run(std::move(request));
  }

  void cancel() override {
    {
      MutexLock lock(mutex_);
      cancelled_ = true;
    }
    for (const ReadPool::Work& work : pool_.withdraw(this)) work();
  }

  Status check_unchanged() override {
    for (const SourceFile& file : files_) TRY(base::check_unchanged(file.fd.get(), file.identity, file.path));
    return {};
  }

  SourceCounters counters() const override { return {read_count_, read_bytes_}; }

 private:
  void run(ReadRequest request) {
    const int64_t begin_ns = base::monotonic_ns();
    const Status status = fill(request);
    const ReadTiming timing{begin_ns, base::monotonic_ns()};
    if (status) {
      ++read_count_;
      read_bytes_ += request.target.size();
    }
    std::exchange(request.done, nullptr)(status, timing);  // what it captured goes before the source may
    MutexLock lock(mutex_);
    if (--in_flight_count_ == 0) none_in_flight_.notify_all();
  }

  Status fill(const ReadRequest& request) {
    const SourceFile& file = files_[request.file];
    const auto place = [&](uint64_t offset) { return text("read ", file.path, " at ", offset); };
    const uint64_t size_bytes = file.identity.size_bytes;
    if (request.offset > size_bytes || request.target.size() > size_bytes - request.offset) {
      return fail(Code::corrupt, text(place(request.offset), ": ", request.target.size(),
                                      " bytes are needed, the file has ", size_bytes, " in all"));
    }
    size_t filled = 0;
    while (true) {
      const uint64_t offset = request.offset + filled;
      if (cancelled_) return fail(Code::cancelled, text(place(offset), ": cancelled"));
      if (filled == request.target.size()) return {};
      const size_t wanted = std::min(request.target.size() - filled, kReadBytesMax);
      const ssize_t got =
          pread_(file.fd.get(), request.target.data() + filled, wanted, static_cast<off_t>(offset));
      const int error = errno;
      if (got < 0 && error == EINTR) continue;
      if (got < 0) return tl::unexpected(base::errno_error(place(offset), error));
      if (got == 0) {
        return fail(Code::corrupt, text(place(offset), ": the file ends ", request.target.size() - filled,
                                        " bytes early; was it cut short?"));
      }
      if (static_cast<size_t>(got) > wanted) {
        return fail(Code::internal,
                    text(place(offset), ": the system returned ", got, " bytes for ", wanted, " asked for"));
      }
      filled += static_cast<size_t>(got);
    }
  }

  const std::vector<SourceFile> files_;
  ReadPool& pool_;
  const PreadFunction pread_;
  std::atomic<uint64_t> read_count_ = 0;
  std::atomic<uint64_t> read_bytes_ = 0;
  std::atomic<bool> cancelled_ = false;  // set under mutex_
  base::Mutex mutex_;
  std::condition_variable none_in_flight_;
  size_t in_flight_count_ GUARDED_BY(mutex_) = 0;
};

}  // namespace

PreadFunction system_pread() {
  return [](int fd, void* target, size_t size_bytes, off_t offset) {
    return ::pread(fd, target, size_bytes, offset);
  };
}

std::unique_ptr<Source> make_file_source(std::vector<SourceFile> files, ReadPool& pool, PreadFunction pread) {
  return std::make_unique<FileSource>(std::move(files), pool, std::move(pread));
}

}  // namespace tensord::storage
