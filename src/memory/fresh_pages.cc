#include "memory/fresh_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // linux/mman.h of 6.1 and newer
#endif

namespace tensord::memory {

FreshPages::FreshPages(std::span<const Segment> run, uint64_t image_bytes, HugePages huge)
    : data_(run.empty() ? nullptr : run.front().data()),
      done_(image_bytes / kHugePageBytes),
      gave_up_(huge == HugePages::unwanted) {
  uint64_t offset = 0;
  for (const Segment& segment : run) {
    const uint64_t fresh = offset + segment.touched_bytes();
    const uint64_t end = offset + segment.size_bytes();
    for (uint64_t at = offset / kHugePageBytes; at < done_.size() && at * kHugePageBytes < end; ++at) {
      const uint64_t stretch_end = (at + 1) * kHugePageBytes;
      // A stretch of several small segments has no room for a huge page.
      if (stretch_end <= fresh || stretch_end > end) done_[at] = true;
    }
    offset = end;
  }
}

void FreshPages::prepare(uint64_t offset, uint64_t size_bytes) {
  const uint64_t end = std::min<uint64_t>((offset + size_bytes + kHugePageBytes - 1) / kHugePageBytes, done_.size());
  for (uint64_t at = offset / kHugePageBytes; at < end && !gave_up_; ++at) {
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
