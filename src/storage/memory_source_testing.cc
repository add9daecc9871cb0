#include "storage/memory_source_testing.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <utility>

#include "base/check.h"
#include "base/mutex.h"
#include "base/text.h"

namespace tensord::storage {

using base::Code;
using base::MutexLock;
using base::text;

namespace {

class ScriptedSource final : public MemorySource {
 public:
  explicit ScriptedSource(MemorySourceOptions options)
      : files_(std::move(options.files)),
        hold_(options.hold),
        changed_(options.changed),
        faults_(std::move(options.faults)) {}

  ~ScriptedSource() override {
    cancel();
    MutexLock lock(mutex_);
    while (in_flight_count_ > 0) lock.wait(none_in_flight_);
  }

  void read(ReadRequest request) override {
    CHECK(request.file < files_.size());
    {
      MutexLock lock(mutex_);
      ++in_flight_count_;
      if (hold_ && !cancelled_) {
        held_.push_back(std::move(request));
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
    release_reads(SIZE_MAX);
  }

  void release_reads(size_t count) override {
    std::deque<ReadRequest> released;  // not those that a `done` asks for meanwhile
    {
      MutexLock lock(mutex_);
      for (; count > 0 && !held_.empty(); --count) {
        released.push_back(std::move(held_.front()));
        held_.pop_front();
      }
    }
    for (ReadRequest& request : released) run(std::move(request));
  }

  size_t held_count() const override {
    MutexLock lock(mutex_);
    return held_.size();
  }

  Status check_unchanged(uint32_t file) override {
    if (changed_) return fail(Code::changed, text("file ", file, " changed while it was read; open it again"));
    return {};
  }

  SourceCounters counters() const override {
    MutexLock lock(mutex_);
    return counters_;
  }

  std::string read_path() const override { return "memory"; }
  std::vector<std::string> notes() const override { return {}; }

 private:
  void run(ReadRequest request) {
    if (request.begin) request.begin();
    Status status = fill(request);
    if (status && request.piece && !request.target.empty()) request.piece(0, request.target);
    std::exchange(request.done, nullptr)(std::move(status),
                                         ReadTiming());  // what it captured goes before the source may
    MutexLock lock(mutex_);
    if (--in_flight_count_ == 0) none_in_flight_.notify_all();
  }

  Status fill(const ReadRequest& request) {
    MutexLock lock(mutex_);
    const auto place = [&] { return text("read file ", request.file, " at ", request.offset); };
    if (cancelled_) return fail(Code::cancelled, text(place(), ": cancelled"));
    const std::span<const std::byte> file = files_[request.file];
    if (request.offset > file.size() || request.target.size() > file.size() - request.offset) {
      return fail(Code::corrupt, text(place(), ": ", request.target.size(), " bytes are needed, the file has ",
                                      file.size(), " in all"));
    }
    const auto wanted = file.subspan(request.offset, request.target.size());
    const auto fault = std::find_if(faults_.begin(), faults_.end(), [&](const Fault& candidate) {
      return candidate.file == request.file && candidate.offset >= request.offset &&
             candidate.offset - request.offset < wanted.size();
    });
    if (fault != faults_.end()) {
      std::copy_n(wanted.begin(), fault->offset - request.offset, request.target.begin());
      const base::Error error = fault->error;
      if (!fault->always) faults_.erase(fault);
      return tl::unexpected(error);
    }
    std::copy(wanted.begin(), wanted.end(), request.target.begin());
    ++counters_.read_count;
    counters_.read_bytes += wanted.size();
    return {};
  }

  const std::vector<std::vector<std::byte>> files_;
  const bool hold_;
  const bool changed_;
  mutable base::Mutex mutex_;
  std::condition_variable none_in_flight_;
  std::vector<Fault> faults_ GUARDED_BY(mutex_);
  std::deque<ReadRequest> held_ GUARDED_BY(mutex_);
  SourceCounters counters_ GUARDED_BY(mutex_);
  size_t in_flight_count_ GUARDED_BY(mutex_) = 0;
  bool cancelled_ GUARDED_BY(mutex_) = false;
};

}  // namespace

std::unique_ptr<MemorySource> make_memory_source(MemorySourceOptions options) {
  return std::make_unique<ScriptedSource>(std::move(options));
}

}  // namespace tensord::storage
