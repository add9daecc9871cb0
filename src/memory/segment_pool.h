// SegmentPool: the daemon's memory, in memfds of fixed size classes that are recycled with their pages.
//
//   size classes   powers of two up to 512 MiB; up to 16 MiB also what has six binary digits: 9.75 MiB, 10 MiB, ...
//   a replica      [512 MiB][512 MiB][64 MiB][2 MiB]     segments at consecutive addresses, largest first
//   the limit      in_use + kept <= host_memory          kept: free segments that still have their pages
#pragma once

#include <sys/types.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "base/mutex.h"
#include "memory/mapped.h"

namespace tensord::memory {

inline constexpr uint64_t kSegmentBytesMin = 4 << 10;
inline constexpr uint64_t kSegmentBytesMax = 512 << 20;

// What is left up to this is one segment: thousands of adapters cost one descriptor and one mapping each for their bytes.
inline constexpr uint64_t kUndividedBytesMax = 16 << 20;

// Segment sizes for a replica of `image_bytes`: whole largest segments, then what is left, rounded up at its sixth binary
// digit (or to kSegmentBytesMin): at most 1/32 of that rest is more than was asked for. It is one segment up to
// kUndividedBytesMax, else one for each digit, at most six. Pure.
std::vector<uint64_t> segment_sizes(uint64_t image_bytes);
uint64_t memory_bytes(uint64_t image_bytes);  // their sum

// What devices keep with a segment, as long as it has its pages.
struct Attachment {
  virtual ~Attachment() = default;
};
struct AttachmentSlot {
  base::Mutex mutex;
  std::shared_ptr<Attachment> attachment GUARDED_BY(mutex);
};

// Memory that is unmapped and closed when it goes.
class Segment {
 public:
  Segment(SharedMemory memory, uid_t owner) : memory_(std::move(memory)), owner_(owner) {}

  int fd() const { return memory_.fd.get(); }
  std::byte* data() const { return memory_.mapped.data(); }
  uint64_t size_bytes() const { return memory_.mapped.size_bytes(); }
  uid_t owner() const { return owner_; }
  // So many bytes from its beginning have their pages; the rest costs its first touch.
  uint64_t touched_bytes() const { return touched_bytes_; }
  void set_touched(uint64_t bytes) { touched_bytes_ = bytes; }
  const std::shared_ptr<AttachmentSlot>& slot() const { return slot_; }

  Status move_to(std::byte* address) { return memory_.mapped.move_to(address); }

 private:
  SharedMemory memory_;
  uid_t owner_ = 0;
  uint64_t touched_bytes_ = 0;
  std::shared_ptr<AttachmentSlot> slot_ = std::make_shared<AttachmentSlot>();
};

// Segments at consecutive addresses: the memory of one replica.
struct SegmentRun {
  std::vector<Segment> segments;
  uint64_t size_bytes() const;
  std::byte* data() const { return segments.empty() ? nullptr : segments.front().data(); }
};

// Segments of a daemon before this one and their sizes: nobody can write to them any more, so they are never used again.
// Code::corrupt unless each is sealed as those of make_segment() are, and of that size.
Result<SegmentRun> adopt_segments(std::vector<std::pair<base::Fd, uint64_t>> files);

// A segment with a memfd of its own, not counted anywhere: for the pool and for the thread that pre-faults.
Result<Segment> make_segment(uint64_t size_bytes, uid_t owner);

// Not thread safe: belongs to the engine's thread.
class SegmentPool {
 public:
  explicit SegmentPool(uint64_t limit_bytes) : limit_bytes_(limit_bytes) {}

  // Memory for `image_bytes`, for artifacts of `owner`. Kept segments of the same owner are used first. Code::exhausted
  // when segments in use leave too little room, or the system has none. Pages of fresh segments hold zeros and cost
  // their first touch; trim() is due before that.
  Result<SegmentRun> allocate(uint64_t image_bytes, uid_t owner);

  // Segments of adopt_segments() are in use from now on, be it over the limit.
  void adopt(const SegmentRun& run) { in_use_bytes_ += run.size_bytes(); }

  // The run's segments are free again, and kept with their pages for artifacts of the same owner. Where the limit was
  // lowered trim() may be due.
  void free(SegmentRun run);

  // Room for a segment that is pre-faulted elsewhere counts as in use until it is kept. False when there is none.
  bool claim(uint64_t size_bytes);
  // Ends a claim; nullopt when the segment could not be made. trim() as with free().
  void settle_claim(uint64_t size_bytes, std::optional<Segment> segment);

  // What is in use stays, be it more than the limit; trim() may be due.
  void set_limit(uint64_t limit_bytes) { limit_bytes_ = limit_bytes; }
  // Takes adopted kept segments out, then the oldest until the limit holds and at most so many are kept. To be destroyed on a thread
  // that may wait: giving back 512 MiB takes the kernel a tenth of a second.
  std::vector<Segment> trim(size_t kept_count_max = SIZE_MAX);

  uint64_t limit_bytes() const { return limit_bytes_; }
  uint64_t in_use_bytes() const { return in_use_bytes_; }
  uint64_t kept_bytes() const { return kept_bytes_; }
  uint64_t free_bytes() const { return limit_bytes_ - std::min(limit_bytes_, in_use_bytes_); }  // kept or not

 private:
  Result<Segment> take(uint64_t size_bytes, uid_t owner);
  void keep(Segment segment);

  uint64_t limit_bytes_;
  uint64_t in_use_bytes_ = 0;
  uint64_t kept_bytes_ = 0;
  std::deque<Segment> kept_;  // adopted ones, then the oldest first
};

}  // namespace tensord::memory
