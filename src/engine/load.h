// Load: one filling of a replica in flight: blocks are read in file order, hashed while they are hot, compared with what
// is known of them, and marked.
//
//   source ──read──► image ──hash──► equal? ──► fill map bit ──► clients that wait
//            (read threads do all of it; the engine's thread starts a load and hears of its end)
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "base/mutex.h"
#include "engine/content.h"
#include "engine/report.h"
#include "memory/fill_map.h"
#include "storage/source.h"

namespace tensord::engine {

struct LoadOrder {
  std::shared_ptr<const Content> content;
  std::unique_ptr<storage::Source> source;
  std::byte* image = nullptr;       // layout.size_bytes; must outlive the load
  memory::FillMap* fill = nullptr;  // must outlive the load
  // What the leaves hashed to before, one entry per file; empty where nothing of the file is known, zeros where a leaf
  // is not.
  std::vector<std::vector<tensor::Digest>> expected;
  uint32_t depth = 4;  // blocks asked for at once
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

  // Thread safe. Ends the load with `reason` unless it is over already.
  void cancel(base::Error reason);

  LoadCounters counters() const;

 private:
  void pump();
  bool issue_block();
  void finish_block(uint32_t block, const Status& read, const storage::ReadTiming& timing);
  Status check_block(uint32_t block);
  void fail(base::Error error);
  void finish();
  void keep_span(LoadSpan span);

  const std::shared_ptr<const Content> content_;
  std::byte* const image_;
  memory::FillMap* const fill_;
  const std::vector<std::vector<tensor::Digest>> expected_;
  const uint32_t depth_;
  const bool keep_spans_;
  const std::function<void(LoadResult)> done_;

  std::vector<tensor::Digest> leaves_;  // each written by the one thread that read its block
  std::atomic<uint32_t> pump_calls_{0};
  std::atomic<int64_t> read_ns_{0};
  std::atomic<int64_t> check_ns_{0};
  std::atomic<uint64_t> bytes_{0};

  base::Mutex mutex_;
  uint32_t next_block_ GUARDED_BY(mutex_) = 0;
  uint32_t in_flight_ GUARDED_BY(mutex_) = 0;
  bool finished_ GUARDED_BY(mutex_) = false;
  std::optional<base::Error> error_ GUARDED_BY(mutex_);
  std::vector<LoadSpan> spans_ GUARDED_BY(mutex_);

  std::unique_ptr<storage::Source>
      source_;  // last: its destructor waits for the threads that use all the others
};

}  // namespace tensord::engine
