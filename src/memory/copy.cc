#include "memory/copy.h"

#include <sched.h>

#include <algorithm>
#include <array>
#include <optional>
#include <system_error>
#include <thread>

#include "base/check.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "base/stream_copy.h"
#include "memory/copy_rows.h"

namespace tensord::memory {

using base::Code;
using base::Error;
using base::fail;
using base::MutexLock;
using base::TargetState;
using tensor::Copy2D;
using tensor::CopyPlan;
using tensor::Task;

namespace {

// Tasks that a thread takes at a time: with 64, taking them costs little beside 100,000 copies of one byte each.
constexpr size_t kPullMax = 64;

void run_task(const Copy2D& record, const Task& task, const std::byte* source, std::byte* target, Stores stores) {
  Plane plane;
  plane.stores = stores;
  plane.source_dtype = record.source_dtype;
  plane.target_dtype = record.target_dtype;
  plane.row_bytes = task.byte_count;
  plane.target_row_bytes = record.cast_bytes(task.byte_count);
  plane.row_count = task.row_count;
  plane.source_row_pitch = record.source_pitch;
  plane.target_row_pitch = record.target_pitch;
  plane.source_line_pitch = record.outer[0].source_pitch;
  plane.target_line_pitch = record.outer[0].target_pitch;
  const uint64_t line_count = record.outer_count > 0 ? record.outer[0].count : 1;
  const uint64_t target_byte = record.cast_bytes(task.byte_begin);
  for (uint64_t index = task.outer_begin, end = index + task.outer_count; index < end; index += plane.line_count) {
    const Copy2D::Place place = record.place(index);
    plane.line_count = std::min(end - index, line_count - index % line_count);
    plane.source =
        source + (place.source_offset + task.row_begin * static_cast<uint64_t>(record.source_pitch) + task.byte_begin);
    plane.target =
        target + (place.target_offset + task.row_begin * static_cast<uint64_t>(record.target_pitch) + target_byte);
    copy_plane(plane, record.is_transposed() && plane.line_count > 1 ? PlaneOrder::tiles : PlaneOrder::lines);
  }
}

// One call of execute(). Its threads pull tasks until there are none.
class Execution {
 public:
  Execution(const CopyPlan& plan, const std::byte* source, std::byte* target, const CopyOptions& options)
      : plan_(plan),
        source_(source),
        target_(target),
        options_(options),
        target_bytes_(plan.target_bytes()),
        thread_count_(choose_thread_count()),
        task_bytes_(choose_task_bytes()),
        stores_(base::can_stream() && target_bytes_ >= base::kStreamBytes ? Stores::streamed : Stores::cached),
        cutter_(plan, task_bytes_) {}

  Result<CopyReport> run() {
    std::vector<std::thread> threads;
    threads.reserve(thread_count_);
    try {
      for (uint32_t thread = 1; thread < thread_count_; ++thread)
        threads.emplace_back([this, thread] { work(thread); });
    } catch (const std::system_error&) {
      // No more threads to be had: those that there are do the work.
    }
    work(0);
    for (std::thread& thread : threads) thread.join();
    const MutexLock lock(mutex_);
    if (error_) {
      error_->target = began_ ? TargetState::dirty : TargetState::untouched;
      return tl::unexpected<Error>(std::move(*error_));
    }
    report_.target_bytes = target_bytes_;
    report_.thread_count = static_cast<uint32_t>(threads.size()) + 1;
    return std::move(report_);
  }

 private:
  uint32_t choose_thread_count() const {
    const int wanted = options_.thread_count > 0 ? options_.thread_count : usable_core_count();
    const uint64_t most = static_cast<uint64_t>(std::min(wanted, kCopyThreadsMax));
    if (target_bytes_ <= std::min(kInlineBytes, options_.task_bytes_max)) return 1;
    return static_cast<uint32_t>(std::min(most, target_bytes_ / std::min(kTaskBytesMin, options_.task_bytes_max) + 1));
  }

  uint64_t choose_task_bytes() const {
    const uint64_t share = target_bytes_ / (uint64_t{thread_count_} * 8);
    return std::clamp<uint64_t>(share, std::min(kTaskBytesMin, options_.task_bytes_max), options_.task_bytes_max);
  }

  void work(uint32_t thread) {
    CopyReport mine;
    std::array<Task, kPullMax> tasks;
    while (const size_t count = pull(tasks)) {
      for (size_t at = 0; at < count && !stopped_; ++at) {
        if (const Status status = run_one(tasks[at], thread, mine); !status) stop(status.error());
      }
    }
    const MutexLock lock(mutex_);
    report_.task_count += mine.task_count;
    report_.wait_ns += mine.wait_ns;
    report_.spans.insert(report_.spans.end(), mine.spans.begin(), mine.spans.end());
  }

  // About one task's worth of payload.
  size_t pull(std::array<Task, kPullMax>& tasks) {
    const MutexLock lock(mutex_);
    size_t count = 0;
    uint64_t bytes = 0;
    while (!stopped_ && count < tasks.size() && bytes < task_bytes_) {
      const std::optional<Task> task = cutter_.next();
      if (!task) break;
      bytes += task->outer_count * task->row_count * task->byte_count;
      tasks[count++] = *task;
    }
    return count;
  }

  Status run_one(const Task& task, uint32_t thread, CopyReport& mine) {
    const Copy2D& record = plan_.records[task.record];
    TRY(check_cancel(options_.cancel));
    if (options_.ready) {
      const int64_t begin_ns = base::monotonic_ns();
      const tensor::Extent extent = source_extent(record, task);
      const Status status = options_.ready(extent.begin, extent.end - extent.begin);
      mine.wait_ns += base::monotonic_ns() - begin_ns;
      TRY(status);
      if (stopped_) return {};
    }
    if (!began_.load(std::memory_order_relaxed)) began_ = true;
    const int64_t begin_ns = options_.keep_spans ? base::monotonic_ns() : 0;
    run_task(record, task, source_, target_, stores_);
    ++mine.task_count;
    if (options_.keep_spans) {
      mine.spans.push_back(
          {begin_ns, base::monotonic_ns(), thread, task.record, task.outer_count * task.row_count * task.byte_count});
    }
    return {};
  }

  void stop(const Error& error) {
    const MutexLock lock(mutex_);
    if (!error_) error_ = error;
    stopped_ = true;
  }

  const CopyPlan& plan_;
  const std::byte* const source_;
  std::byte* const target_;
  const CopyOptions& options_;
  const uint64_t target_bytes_;
  const uint32_t thread_count_;
  const uint64_t task_bytes_;
  const Stores stores_;
  std::atomic<bool> stopped_{false};
  std::atomic<bool> began_{false};  // some task has begun to write
  base::Mutex mutex_;
  tensor::TaskCutter cutter_ GUARDED_BY(mutex_);
  CopyReport report_ GUARDED_BY(mutex_);
  std::optional<Error> error_ GUARDED_BY(mutex_);
};

}  // namespace

int usable_core_count() {
  cpu_set_t cores;
  return sched_getaffinity(0, sizeof cores, &cores) == 0 ? std::max(CPU_COUNT(&cores), 1) : 1;
}

Status check_cancel(const int32_t* cancel) {
  if (cancel == nullptr || __atomic_load_n(cancel, __ATOMIC_RELAXED) == 0) return {};
  return fail(Code::cancelled, "copy: cancelled by the caller");
}

Result<CopyReport> execute(const CopyPlan& plan, std::span<const std::byte> source, std::span<std::byte> target,
                           const CopyOptions& options) {
  CHECK(options.task_bytes_max > 0);
  return Execution(plan, source.data(), target.data(), options).run();
}

}  // namespace tensord::memory
