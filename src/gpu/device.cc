#include "gpu/device.h"

#include <algorithm>
#include <chrono>
#include <set>

#include "base/clock.h"
#include "base/log.h"
#include "base/text.h"

namespace tensord::gpu {

using base::Code;
using base::fail;

namespace {
constexpr size_t kStreamCount = 2;
constexpr size_t kChunkCountMax = 4;  // under way: enough that a copy engine never waits for this thread
// The thread wakes up for each chunk: 2.4 ms at the speed of the bus.
constexpr uint64_t kChunkBytes = 128 << 20;
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

void Device::call(std::function<void()> work) {
  base::MutexLock lock(mutex_);
  calls_.push_back(std::move(work));
  called_.notify_one();
}

void Device::submit(std::unique_ptr<CopyJob> job) {
  call([this, order = std::make_shared<std::unique_ptr<CopyJob>>(std::move(job))] { start(std::move(*order)); });
}

void Device::make(uint64_t size_bytes, std::function<void(MadeMemory)> done) {
  call([this, size_bytes, done = std::move(done)] {
    const Status awake = wake_up();
    done(awake ? make_memory(driver_, number_, size_bytes) : base::pass_on(awake));
  });
}

void Device::cancel(uint64_t client, uint64_t number) {
  call([this, client, number] {
    end_jobs([=](const CopyJob& job) { return job.client == client && job.number == number; },
             {Code::cancelled, "copying to the GPU was cancelled"});
  });
}

void Device::forget(uint64_t client) {
  call([this, client] {
    end_jobs([=](const CopyJob& job) { return job.client == client; }, {Code::cancelled, "the client is gone"});
  });
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
  const Status awake = take_device();
  if (!awake) rest();
  return awake;
}

Status Device::take_device() {
  TRY_ASSIGN(primary_, Primary::retain(driver_, number_));
  Handle made = nullptr;
  while (streams_.size() < kStreamCount) {
    TRY(driver_.check(driver_.make_stream(&made, kNonBlocking), "make a stream on a GPU"));
    streams_.emplace_back(made, driver_.end_stream);
  }
  while (events_.size() < kChunkCountMax) {
    TRY(driver_.check(driver_.make_event(&made, kSleepUntilDone), "make an event on a GPU"));
    events_.emplace_back(made, driver_.end_event);
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
  events_.clear();
  streams_.clear();
  primary_.reset();
  base::log(base::LogLevel::info, "GPU ", number_, " is given back");
}

void Device::start(std::unique_ptr<CopyJob> job) {
  const auto running = std::make_shared<Running>(std::move(job));
  Status started = wake_up();
  if (started) started = open_source(*running);
  if (!started) running->error = started.error();
  running_.push_back(running);
}

// Of host memory each segment gets its second mapping, and what the job is going to read begins to be registered.
Status Device::open_source(Running& running) {
  const CopyJob& job = *running.job;
  if (job.device_source) {
    TRY_ASSIGN(running.device_source, OpenedMemory::open(driver_, number_, *job.device_source, kReadOnly));
    return {};
  }
  for (const HostSegment& segment : job.source) {
    base::MutexLock lock(segment.slot->mutex);
    if (segment.slot->attachment == nullptr) {
      TRY_ASSIGN(segment.slot->attachment, Pinned::map(primary_, segment.data, segment.size_bytes));
      std::erase_if(pinned_, [](const auto& slot) { return slot.expired(); });
      pinned_.push_back(segment.slot);
    }
    running.segments.push_back(std::static_pointer_cast<Pinned>(segment.slot->attachment));
  }
  using Part = std::pair<uint32_t, uint64_t>;  // of which segment, and where in it
  std::set<Part> parts;
  std::optional<Part> before;
  std::vector<PinAhead::Stretch> stretches;
  PieceCutter cutter(job, kPinBytes);
  while (const auto piece = cutter.next()) {
    const uint64_t offset = piece->segment_offset / kPinBytes * kPinBytes;
    const Part part(piece->segment, offset);
    if (std::exchange(before, part) == part) continue;  // as of most small pieces
    const auto& segment = running.segments[piece->segment];
    if (segment->is_registered(offset) || !parts.insert(part).second) continue;
    const uint64_t begin = piece->image_offset - (piece->segment_offset - offset);
    const uint64_t end = std::min({begin + kPinBytes, begin + segment->size_bytes() - offset, job.image_bytes});
    const auto ready = [&job, begin, end] {
      const auto there = job.ready(begin, end);
      return !there || *there;
    };
    stretches.push_back({segment, offset, ready});
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
  const Handle stream = streams_[chunk_count_ % kStreamCount].get();
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

// Where a piece goes to and comes from, opened and registered where that is not done yet. While copies are under way the
// driver spins in it (1 ms a target on two H100, 0.05 ms else); opened before the first copy two ranks are 10 % slower.
Status Device::prepare(Running& running, const Piece& piece, Address& target, Address& source) {
  const int64_t begin_ns = base::monotonic_ns();
  std::shared_ptr<OpenedMemory>& memory = running.targets[piece.target];
  if (memory == nullptr) {
    TRY_ASSIGN(memory, OpenedMemory::open(driver_, number_, running.job->targets[piece.target]));
  }
  target = memory->address() + piece.target_offset;
  if (running.device_source) {
    source = running.device_source->address() + piece.image_offset;
  } else {
    TRY_ASSIGN(const std::byte* data, running.segments[piece.segment]->at(piece.segment_offset));
    source = reinterpret_cast<Address>(data);
  }
  running.report.prepare_ns += base::monotonic_ns() - begin_ns;
  return {};
}

Status Device::issue(Running& running, const Piece& piece, Batch& batch, Handle stream) {
  Address target = 0, source = 0;
  TRY(prepare(running, piece, target, source));
  if (piece.row_count == 1 && piece.row_bytes < kBatchedBytesMax) {
    batch.targets.push_back(target);
    batch.sources.push_back(source);
    batch.sizes.push_back(piece.row_bytes);
    return {};
  }
  ++running.report.call_count;
  if (piece.row_count == 1) return copy(running, target, source, piece.row_bytes, stream);
  const Rows rows{.source = {.type = running.device_source ? 2 : 1,
                             .host = reinterpret_cast<const void*>(source),
                             .device = source,
                             .pitch = piece.source_pitch},
                  .target = {.type = 2, .device = target, .pitch = piece.target_pitch},
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

// Where its end cannot be told it waits for what was issued itself: nothing may be under way behind a job's end.
Status Device::close_chunk(const std::shared_ptr<Running>& running, Handle stream, uint64_t image_end) {
  const Handle event = events_[chunk_count_ % kChunkCountMax].get();
  const Status recorded = driver_.check(driver_.record(event, stream), "record an event on a GPU");
  if (!recorded) {
    driver_.wait_stream(stream);
    return recorded;
  }
  ++chunk_count_;
  chunks_.push_back({event, running, image_end});
  return {};
}

void Device::retire_oldest() {
  const Chunk chunk = std::move(chunks_.front());
  chunks_.pop_front();
  const Status done = driver_.check(driver_.wait(chunk.event), "copy to a GPU");
  if (!done) return restart(done.error());
  const CopyJob& job = *chunk.running->job;
  if (job.copied && !chunk.running->error) job.copied(chunk.image_end);
  finish_if_over(chunk.running);
}

void Device::finish_if_over(const std::shared_ptr<Running>& running) {
  if (running->next && !running->error) return;
  const auto is_of_it = [&](const Chunk& chunk) { return chunk.running == running; };
  if (std::any_of(chunks_.begin(), chunks_.end(), is_of_it)) return;
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
  for (const auto& stream : streams_) driver_.wait_stream(stream.get());
  chunks_.clear();
  end_jobs([](const CopyJob&) { return true; }, {Code::unavailable, why.message});
  rest();
}

}  // namespace tensord::gpu
