#include "memory/fresh_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#include "base/text.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // linux/mman.h of 6.1 and newer
#endif

namespace tensord::memory {

FreshPages::FreshPages(const SegmentRun& run, HugePages huge)
    : data_(run.data()),
      done_((run.size_bytes() + kHugePageBytes - 1) / kHugePageBytes),
      gave_up_(huge == HugePages::unwanted) {
  uint64_t offset = 0;
  for (const Segment& segment : run.segments) {
    // A segment below 2 MiB has no room for a huge page; such ones share the run's last stretch.
    const bool skips = segment.is_touched() || segment.size_bytes() < kHugePageBytes;
    const uint64_t end = offset + segment.size_bytes();
    for (uint64_t at = offset / kHugePageBytes; skips && at * kHugePageBytes < end; ++at) done_[at] = true;
    offset = end;
  }
}

void FreshPages::prepare(uint64_t offset, uint64_t size_bytes) {
  if (size_bytes == 0) return;
  const uint64_t last = (offset + size_bytes - 1) / kHugePageBytes;
  for (uint64_t at = offset / kHugePageBytes; at <= last && !gave_up_; ++at) {
    if (!done_[at].exchange(true)) fill(data_ + at * kHugePageBytes);
  }
}

void FreshPages::fill(std::byte* stretch) {
  constexpr uint64_t kPageBytes = 4096;
  // A stretch without any page cannot be collapsed.
  ::madvise(stretch, kPageBytes, MADV_POPULATE_READ);
  if (::madvise(stretch, kHugePageBytes, MADV_COLLAPSE) == 0) return;
  const int error = errno;
  if (error == EAGAIN || error == EBUSY) return;  // somebody else is at work on these pages
  if (gave_up_.exchange(true)) return;
  base::MutexLock lock(mutex_);
  problem_ = base::errno_error("huge pages: MADV_COLLAPSE", error).message + "; pages of 4 KiB are used";
}

std::string FreshPages::problem() const {
  base::MutexLock lock(mutex_);
  return problem_;
}

}  // namespace tensord::memory
