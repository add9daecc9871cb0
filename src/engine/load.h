// Load: one filling of a replica in flight: blocks are read in file order, hashed while they are hot, compared with what
// is known of them, and marked.
//
//   blocks   [ ][ ][ ][ ][ ][ ][ ][ ][ ][ ]...      about 1 MiB each
//   runs     [read 0      ][read 1      ]...        consecutive blocks of one file, up to 16 MiB; wanted ones first
//   a run    source ──piece──► hash ──► equal? ──► fill map bit ──► clients that wait
//            (read threads do all of it; the engine's thread starts a load and hears of its end)
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "base/mutex.h"
#include "engine/content.h"
#include "engine/report.h"
#include "memory/fill_map.h"
#include "memory/fresh_pages.h"
#include "storage/source.h"

namespace tensord::engine {

// Best of 1, 4 and 16 MiB for direct reads on disks measured; a smaller load is cut into 4 reads a thread.
inline constexpr uint64_t kRunBytesMax = 16 << 20;
inline constexpr uint64_t kRunBytesMin = 1 << 20;
// Asked for at once: what keeps a disk busy (4 reads of the largest size), and every thread twice.
inline constexpr uint64_t kInFlightBytes = 64 << 20;

struct LoadOrder {
  std::shared_ptr<const Content> content;
  std::unique_ptr<storage::Source> source;
  std::byte* image = nullptr;           // layout.size_bytes; must outlive the load
  memory::FillMap* fill = nullptr;      // must outlive the load
  memory::FreshPages* pages = nullptr;  // of the image; must outlive the load; nullptr: it has its pages
  // What each leaf hashed to before: zeros, or nothing at all, where that is not known.
  std::vector<tensor::Digest> expected;
  uint32_t thread_count = 2;  // of the source
  uint64_t in_flight_bytes_max = kInFlightBytes;
  bool keep_spans = false;
};

struct LoadResult {
  Status status;                       // of the first thing that went wrong
  std::vector<tensor::Digest> leaves;  // one per leaf of the layout; only when all went well
  tensor::Digest artifact_id;
  LoadCounters counters;
  std::vector<LoadSpan> spans;
};

class Load {
 public:
  // `done` is called once, on any thread, as the last thing the load does; it must not destroy the load itself but may
  // have it destroyed elsewhere (the destructor waits for the threads).
  Load(LoadOrder order, std::function<void(LoadResult)> done);

  void start();

  // Thread safe. Blocks [first, last) are read before others from now on, as far as they are not asked for yet.
  void want(uint32_t first, uint32_t last);

  // Thread safe. Ends the load with `reason` unless it is over already.
  void cancel(base::Error reason);

  LoadCounters counters() const;
  const storage::Source& source() const { return *source_; }  // for its figures

 private:
  class Run;

  void pump();
  bool issue_run();
  std::optional<uint32_t> next_block() REQUIRES(mutex_);
  uint32_t run_end(uint32_t first) REQUIRES(mutex_);
  void finish_run(Run& run, const Status& read, const storage::ReadTiming& timing);
  Status check_leaf(uint32_t at, const tensor::Digest& digest);
  void fail(base::Error error);
  void finish();
  void keep_span(LoadSpan span);

  LoadOrder order_;  // constant after construction; its source is source_
  const std::function<void(LoadResult)> done_;
  const uint64_t run_bytes_;

  std::vector<tensor::Digest> leaves_;  // each written by the one thread that read its block
  std::atomic<uint32_t> pump_calls_{0};
  std::atomic<int64_t> begin_ns_{0};
  std::atomic<int64_t> end_ns_{0};
  std::atomic<int64_t> touch_ns_{0};
  std::atomic<int64_t> check_ns_{0};
  std::atomic<uint64_t> bytes_{0};

  base::Mutex mutex_;
  std::vector<bool> issued_ GUARDED_BY(mutex_);  // by block
  uint32_t next_block_ GUARDED_BY(mutex_) = 0;   // all before it are issued
  std::deque<std::pair<uint32_t, uint32_t>> wanted_ GUARDED_BY(mutex_);
  uint32_t in_flight_ GUARDED_BY(mutex_) = 0;
  uint64_t in_flight_bytes_ GUARDED_BY(mutex_) = 0;
  bool finished_ GUARDED_BY(mutex_) = false;
  std::optional<base::Error> error_ GUARDED_BY(mutex_);
  std::vector<LoadSpan> spans_ GUARDED_BY(mutex_);

  std::unique_ptr<storage::Source> source_;  // last: its destructor waits for the threads that use all the others
};

}  // namespace tensord::engine
