#include "gpu/device.h"

#include <algorithm>
#include <chrono>

#include "base/clock.h"
#include "base/log.h"
#include "base/text.h"

namespace tensord::gpu {

using base::Code;
using base::fail;

namespace {
constexpr size_t kStreamCount = 2;
constexpr size_t kChunkCountMax = 4;  // under way: enough that a copy engine never waits for this thread
// The thread wakes up for each chunk: 1.2 ms at the speed of the bus.
constexpr uint64_t kChunkBytes = 64 << 20;
// Copies smaller than this are handed over together: at 64 KiB single calls move 16 GB/s, the batch call 40 (H200).
constexpr uint64_t kBatchedBytesMax = 1 << 20;
constexpr size_t kBatchCountMax = 1024;
constexpr auto kStalled = std::chrono::milliseconds(1);  // how often bytes that are not there are looked for
constexpr int64_t kPatienceNs = 20'000'000;              // what is read in file order comes soon; then it is asked for
}  // namespace

// Contiguous copies that go in one call.
struct Device::Batch {
  std::vector<Address> targets, sources;
  std::vector<size_t> sizes;
};

struct Device::Running {
  explicit Running(std::unique_ptr<CopyJob> order) : job(std::move(order)), cutter(*job, kPinBytes) {}
  const std::unique_ptr<CopyJob> job;
  PieceCutter cutter;
  std::optional<Piece> next = cutter.next();
  std::vector<std::shared_ptr<OpenedMemory>> targets = std::vector<std::shared_ptr<OpenedMemory>>(job->targets.size());
  std::vector<std::shared_ptr<Pinned>> segments;
  std::shared_ptr<OpenedMemory> device_source;
  std::optional<PinAhead> pins;
  size_t chunk_count = 0;  // under way
  DeviceReport report{.begin_ns = base::monotonic_ns()};
  int64_t stalled_ns = 0;  // since when; 0: it is not
  bool wanted = false;     // the piece that it stalls at was asked for
  std::optional<base::Error> error;
};

Device::Device(const Driver& driver, int number, int64_t idle_ms)
    : driver_(driver), number_(number), idle_ms_(idle_ms), thread_([this] { run(); }) {}

Device::~Device() {
  {
    base::MutexLock lock(mutex_);
    stopping_ = true;
    called_.notify_one();
  }
  thread_.join();
}

void Device::submit(std::unique_ptr<CopyJob> job) {
  base::MutexLock lock(mutex_);
  calls_.push_back(
      [this, order = std::make_shared<std::unique_ptr<CopyJob>>(std::move(job))] { start(std::move(*order)); });
  called_.notify_one();
}

void Device::make(uint64_t size_bytes, std::function<void(MadeMemory)> done) {
  base::MutexLock lock(mutex_);
  calls_.push_back([this, size_bytes, done = std::move(done)] {
    const Status awake = wake_up();
    if (!awake) rest();
    done(awake ? make_memory(driver_, number_, size_bytes) : base::pass_on(awake));
  });
  called_.notify_one();
}

void Device::cancel(uint64_t client, uint64_t number) {
  base::MutexLock lock(mutex_);
  calls_.push_back([this, client, number] {
    end_jobs([=](const CopyJob& job) { return job.client == client && job.number == number; },
             {Code::cancelled, "copying to the GPU was cancelled"});
  });
  called_.notify_one();
}

void Device::forget(uint64_t client) {
  base::MutexLock lock(mutex_);
  calls_.push_back([this, client] {
    end_jobs([=](const CopyJob& job) { return job.client == client; }, {Code::cancelled, "the client is gone"});
  });
  called_.notify_one();
}

void Device::run() {
  while (take_calls()) step();
  end_jobs([](const CopyJob&) { return true; }, {Code::cancelled, "the daemon is stopping"});
  while (!chunks_.empty()) retire_oldest();
  rest();
}

// False when it is time to end. Waits where there is nothing to do.
bool Device::take_calls() {
  std::deque<std::function<void()>> calls;
  {
    base::MutexLock lock(mutex_);
    while (calls_.empty() && !stopping_ && running_.empty()) {
      if (primary_ == nullptr) {
        lock.wait(called_);
      } else if (!lock.wait_for(called_, std::chrono::milliseconds(idle_ms_)) && calls_.empty() && !stopping_) {
        rest();
      }
    }
    if (stopping_ && calls_.empty()) return false;  // each job that was submitted has to end
    calls.swap(calls_);
  }
  for (const auto& call : calls) call();
  return true;
}

// Every job in turn gets a chunk under way, if its bytes are there.
void Device::step() {
  bool issued = false;
  const auto all = running_;
  for (const auto& running : all) {
    if (running->error || !running->next) continue;
    const auto done = issue_chunk(running);
    if (!done) running->error = done.error();
    issued |= done && *done;
    while (chunks_.size() >= kChunkCountMax) retire_oldest();
  }
  if (!issued && !chunks_.empty()) retire_oldest();
  for (const auto& running : all) finish_if_over(running);
  if (issued || !chunks_.empty() || running_.empty()) return;
  const int64_t begin_ns = base::monotonic_ns();
  {
    base::MutexLock lock(mutex_);
    if (calls_.empty() && !stopping_) lock.wait_for(called_, kStalled);
  }
  for (const auto& running : running_) running->report.wait_ns += base::monotonic_ns() - begin_ns;
}

Status Device::wake_up() {
  if (primary_ != nullptr) return {};
  TRY_ASSIGN(primary_, Primary::retain(driver_, number_));
  for (size_t at = 0; at < kStreamCount; ++at) {
    TRY(driver_.check(driver_.make_stream(&streams_.emplace_back(nullptr), kNonBlocking), "make a stream on a GPU"));
  }
  base::log(base::LogLevel::info, "GPU ", number_, " is in use");
  return {};
}

void Device::rest() {
  if (primary_ == nullptr) return;
  for (const auto& weak : std::exchange(pinned_, {})) {
    const auto slot = weak.lock();
    if (slot == nullptr) continue;
    base::MutexLock lock(slot->mutex);
    slot->attachment.reset();
  }
  for (Handle event : std::exchange(free_events_, {})) driver_.end_event(event);
  for (Handle stream : std::exchange(streams_, {})) {
    if (stream != nullptr) driver_.end_stream(stream);
  }
  primary_.reset();
  base::log(base::LogLevel::info, "GPU ", number_, " is given back");
}

void Device::start(std::unique_ptr<CopyJob> job) {
  const auto running = std::make_shared<Running>(std::move(job));
  const Status awake = wake_up();
  const Status pinned = awake ? pin(*running) : Status();
  if (!awake) running->error = awake.error();
  if (!awake) rest();
  if (!pinned) running->error = pinned.error();
  running_.push_back(running);
}

// Gives each segment its second mapping, and begins to register what the job is going to read.
Status Device::pin(Running& running) {
  const CopyJob& job = *running.job;
  if (job.device_source) {
    TRY_ASSIGN(running.device_source, OpenedMemory::open(driver_, number_, *job.device_source, kReadOnly));
    return {};
  }
  constexpr uint64_t kGrainBytes = 64 << 10;
  std::vector<bool> wanted(job.image_bytes / kGrainBytes + 1);
  for (const DeviceCopy& copy : job.copies) {
    const uint64_t end = copy.source_offset + (copy.row_count - 1) * copy.source_pitch + copy.row_bytes;
    for (uint64_t at = copy.source_offset / kGrainBytes; at * kGrainBytes < end; ++at) wanted[at] = true;
  }
  std::vector<PinAhead::Stretch> stretches;
  uint64_t begin = 0;  // of the segment in the image
  for (size_t number = 0; number < job.source.size(); ++number) {
    const HostSegment& segment = job.source[number];
    base::MutexLock lock(segment.slot->mutex);
    if (segment.slot->attachment == nullptr) {
      TRY_ASSIGN(segment.slot->attachment, Pinned::map(primary_, segment.data, segment.size_bytes));
      std::erase_if(pinned_, [](const auto& slot) { return slot.expired(); });
      pinned_.push_back(segment.slot);
    }
    const auto pinned = std::static_pointer_cast<Pinned>(segment.slot->attachment);
    running.segments.push_back(pinned);
    for (uint64_t at = 0; at < segment.size_bytes && begin + at < job.image_bytes; at += kPinBytes) {
      const uint64_t first = begin + at;
      const uint64_t last = std::min({first + kPinBytes, begin + segment.size_bytes, job.image_bytes});
      const auto grain = [&](uint64_t offset) { return wanted.begin() + static_cast<ptrdiff_t>(offset / kGrainBytes); };
      const bool is_wanted = std::find(grain(first), grain(last - 1) + 1, true) != grain(last - 1) + 1;
      if (!is_wanted || pinned->is_registered(at)) continue;
      const auto ready = [&job, first, last] {
        const auto there = job.ready(first, last);
        return !there || *there;
      };
      stretches.push_back({pinned, at, ready});
    }
    begin += segment.size_bytes;
  }
  if (stretches.size() > 1) running.pins.emplace(std::move(stretches));
  return {};
}

void Device::end_jobs(const std::function<bool(const CopyJob&)>& which, const base::Error& why) {
  const auto all = running_;
  for (const auto& running : all) {
    if (!which(*running->job)) continue;
    if (!running->error) running->error = why;
    finish_if_over(running);
  }
}

// False where its next bytes are not there.
Result<bool> Device::issue_chunk(const std::shared_ptr<Running>& running) {
  const Handle stream = streams_[next_stream_++ % streams_.size()];
  Batch batch;
  uint64_t bytes = 0, image_end = 0;
  size_t count = 0;
  Status issued;
  const uint64_t chunk_bytes = running->device_source ? kPeerPieceBytes : kChunkBytes;
  for (; running->next && bytes < chunk_bytes && count < kBatchCountMax; ++count) {
    const auto ready = is_ready(*running, *running->next);
    if (!ready) issued = base::pass_on(ready);
    if (!ready || !*ready) break;
    issued = issue(*running, *running->next, batch, stream);
    if (!issued) break;
    bytes += running->next->bytes();
    image_end = running->next->image_end();
    running->next = running->cutter.next();
  }
  if (issued) issued = flush(*running, batch, stream);
  running->report.bytes += bytes;
  if (count > 0) TRY(close_chunk(running, stream, image_end));  // also behind an error: what was issued is under way
  TRY(issued);
  return count > 0;
}

Result<bool> Device::is_ready(Running& running, const Piece& piece) {
  const auto ready = running.job->ready(piece.image_offset, piece.image_end());
  if (!ready || *ready) {
    running.stalled_ns = 0;
    running.wanted = false;
    return ready;
  }
  const int64_t now_ns = base::monotonic_ns();
  if (running.stalled_ns == 0) running.stalled_ns = now_ns;
  if (!running.wanted && now_ns - running.stalled_ns > kPatienceNs) {
    running.wanted = true;
    running.job->want(piece.image_offset, piece.image_end());
  }
  return false;
}

Status Device::issue(Running& running, const Piece& piece, Batch& batch, Handle stream) {
  TRY_ASSIGN(const Address memory, target(running, piece.target));
  TRY_ASSIGN(const Address data, source(running, piece));
  const Address address = memory + piece.target_offset;
  if (piece.row_count == 1 && piece.row_bytes < kBatchedBytesMax) {
    batch.targets.push_back(address);
    batch.sources.push_back(data);
    batch.sizes.push_back(piece.row_bytes);
    return {};
  }
  ++running.report.call_count;
  if (piece.row_count == 1) return copy(running, address, data, piece.row_bytes, stream);
  const Side from = running.device_source
                        ? Side{.type = 2, .device = data, .pitch = piece.source_pitch}
                        : Side{.type = 1, .host = reinterpret_cast<const void*>(data), .pitch = piece.source_pitch};
  const Rows rows{.source = from,
                  .target = {.type = 2, .device = address, .pitch = piece.target_pitch},
                  .row_bytes = piece.row_bytes,
                  .row_count = piece.row_count};
  return driver_.check(driver_.copy_rows(&rows, stream), "copy rows to a GPU");
}

Status Device::copy(const Running& running, Address target, Address source, uint64_t size_bytes, Handle stream) {
  const auto call = running.device_source ? driver_.copy_between : driver_.copy;
  return driver_.check(call(target, source, size_bytes, stream), "copy to a GPU");
}

Status Device::flush(Running& running, Batch& batch, Handle stream) {
  const size_t count = batch.sizes.size();
  if (count > 1 && driver_.copy_batch != nullptr) {
    BatchKind kind;
    size_t begin = 0;
    ++running.report.call_count;
    return driver_.check(driver_.copy_batch(batch.targets.data(), batch.sources.data(), batch.sizes.data(), count,
                                            &kind, &begin, 1, stream),
                         "copy a batch to a GPU");
  }
  running.report.call_count += count;
  for (size_t at = 0; at < count; ++at) {
    TRY(copy(running, batch.targets[at], batch.sources[at], batch.sizes[at], stream));
  }
  return {};
}

Result<Address> Device::target(Running& running, uint32_t number) {
  std::shared_ptr<OpenedMemory>& memory = running.targets[number];
  if (memory != nullptr) return memory->address();
  const int64_t begin_ns = base::monotonic_ns();
  TRY_ASSIGN(memory, OpenedMemory::open(driver_, number_, running.job->targets[number]));
  running.report.prepare_ns += base::monotonic_ns() - begin_ns;
  return memory->address();
}

Result<Address> Device::source(Running& running, const Piece& piece) {
  if (running.device_source) return running.device_source->address() + piece.image_offset;
  const int64_t begin_ns = base::monotonic_ns();
  const auto data = running.segments[piece.segment]->at(piece.segment_offset);
  running.report.prepare_ns += base::monotonic_ns() - begin_ns;
  return data.map([](const std::byte* at) { return reinterpret_cast<Address>(at); });
}

// Where no event can be had it waits for what was issued itself: nothing may be under way behind a job's end.
Status Device::close_chunk(const std::shared_ptr<Running>& running, Handle stream, uint64_t image_end) {
  Handle event = nullptr;
  Status closed;
  if (free_events_.empty()) {
    closed = driver_.check(driver_.make_event(&event, kSleepUntilDone), "make an event on a GPU");
  } else {
    event = free_events_.back();
    free_events_.pop_back();
  }
  if (closed) closed = driver_.check(driver_.record(event, stream), "record an event on a GPU");
  if (closed) {
    chunks_.push_back({event, running, image_end});
    ++running->chunk_count;
    return {};
  }
  if (event != nullptr) free_events_.push_back(event);
  driver_.wait_stream(stream);
  return closed;
}

void Device::retire_oldest() {
  const Chunk chunk = std::move(chunks_.front());
  chunks_.pop_front();
  const Status done = driver_.check(driver_.wait(chunk.event), "copy to a GPU");
  free_events_.push_back(chunk.event);
  --chunk.running->chunk_count;
  if (!done) return restart(done.error());
  const CopyJob& job = *chunk.running->job;
  if (job.copied && !chunk.running->error) job.copied(chunk.image_end);
  finish_if_over(chunk.running);
}

void Device::finish_if_over(const std::shared_ptr<Running>& running) {
  if (running->chunk_count > 0 || (running->next && !running->error)) return;
  const auto found = std::find(running_.begin(), running_.end(), running);
  if (found == running_.end()) return;
  running_.erase(found);
  running->pins.reset();
  running->targets.clear();
  running->segments.clear();
  running->device_source.reset();
  running->job->source.clear();  // they may go once `done` is called
  running->report.end_ns = base::monotonic_ns();
  if (running->error && running->report.bytes > 0) running->error->target = base::TargetState::dirty;
  if (running->error) return running->job->done(tl::unexpected(*running->error));
  running->job->done(running->report);
}

// The device failed while it copied: whose fault that was nobody knows. All jobs end, and it begins anew.
void Device::restart(const base::Error& why) {
  base::log(base::LogLevel::error, "GPU ", number_, " begins anew: ", why.message);
  for (Handle stream : streams_) driver_.wait_stream(stream);
  for (const Chunk& chunk : std::exchange(chunks_, {})) {
    driver_.end_event(chunk.event);
    --chunk.running->chunk_count;
  }
  end_jobs([](const CopyJob&) { return true; }, {Code::unavailable, why.message});
  rest();
}

}  // namespace tensord::gpu
