// Runs a CopyPlan with CPU threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/result.h"
#include "tensor/plan.h"

namespace tensord::memory {

using base::Result;
using base::Status;

// Payload of one task at most: big enough to hide its bookkeeping. Smaller copies get smaller tasks, eight a thread, so
// that threads end at about the same time; below kTaskBytesMin a task is not worth its bookkeeping.
inline constexpr uint64_t kTaskBytes = 4 << 20;
inline constexpr uint64_t kTaskBytesMin = 256 << 10;
// Below this much payload the calling thread copies alone: starting a thread costs about 50 us.
inline constexpr uint64_t kInlineBytes = 4 << 20;
// Threads of one call at most, whatever is asked for.
inline constexpr int kCopyThreadsMax = 256;
int usable_core_count();  // that this process may run on

// One run of copies, for traces.
struct CopySpan {
  int64_t begin_ns = 0;  // base::monotonic_ns
  int64_t end_ns = 0;
  uint32_t thread = 0;
  uint32_t record = 0;
  uint64_t size_bytes = 0;
};

struct CopyReport {
  uint64_t target_bytes = 0;
  uint64_t task_count = 0;
  uint32_t thread_count = 0;
  int64_t wait_ns = 0;          // summed over threads: in `ready`
  std::vector<CopySpan> spans;  // only when asked for
};

struct CopyOptions {
  int thread_count = 0;  // 0: one per core this process may run on
  // Called before a task reads bytes [offset, offset + size_bytes) of the source; may block until they are there. Called
  // from several threads at once. Tasks come in the plan's order, so that copying follows a filling replica.
  std::function<Status(uint64_t offset, uint64_t size_bytes)> ready;
  const int32_t* cancel = nullptr;  // any thread may set it; checked between tasks: Code::cancelled
  bool keep_spans = false;
  uint64_t task_bytes_max = kTaskBytes;
};

// Code::cancelled once `cancel` points to another number than 0.
Status check_cancel(const int32_t* cancel);

// `plan` must have passed check_plan with the sizes of source and target. Threads are
// started and ended within the call; after it returns, whatever the result, nothing touches the target. The first
// error wins, and says in Error::target whether any task had begun to write. Casts are fused with the copy; transposes
// of elements run in cache-sized tiles; no allocation grows with the payload. Source and target must not overlap.
Result<CopyReport> execute(const tensor::CopyPlan& plan, std::span<const std::byte> source, std::span<std::byte> target,
                           const CopyOptions& options);

}  // namespace tensord::memory
