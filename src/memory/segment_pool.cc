#include "memory/segment_pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <numeric>

#include "base/bytes.h"
#include "base/check.h"
#include "base/text.h"

namespace tensord::memory {

using base::Code;
using base::fail;

namespace {
// Who has the segments that cannot be written to: no replica is of this uid (chown(2)).
constexpr uid_t kNobody = static_cast<uid_t>(-1);

// Address ranges begin at multiples of about their size, so that huge pages fit and page tables move by whole directories;
// thousands of small ones lie close together and share page tables.
uint64_t alignment_of(uint64_t size_bytes) {
  return std::clamp(std::bit_floor(size_bytes), kSegmentBytesMin, kSegmentBytesMax);
}

// Moves the segments to consecutive addresses.
Status place(SegmentRun& run) {
  if (run.segments.empty()) return {};
  const uint64_t size_bytes = run.size_bytes();
  TRY_ASSIGN(std::byte * address, reserve_addresses(size_bytes, alignment_of(size_bytes)));
  std::byte* const end = address + size_bytes;
  for (Segment& segment : run.segments) {
    if (const Status moved = segment.move_to(address); !moved) {
      ::munmap(address, static_cast<size_t>(end - address));
      return base::pass_on(moved);
    }
    address += segment.size_bytes();
  }
  return {};
}
}  // namespace

std::vector<uint64_t> segment_sizes(uint64_t image_bytes) {
  std::vector<uint64_t> sizes(image_bytes / kSegmentBytesMax, kSegmentBytesMax);
  uint64_t rest = image_bytes % kSegmentBytesMax;
  if (rest == 0) return sizes;
  constexpr uint64_t kDigits = 6;
  const uint64_t unit = std::max(kSegmentBytesMin, std::bit_floor(rest) >> (kDigits - 1));
  rest = base::align_up(rest, unit);
  if (rest <= kUndividedBytesMax) {
    sizes.push_back(rest);
    return sizes;
  }
  while (rest > 0) {
    sizes.push_back(std::bit_floor(rest));
    rest -= sizes.back();
  }
  return sizes;
}

uint64_t memory_bytes(uint64_t image_bytes) {
  const std::vector<uint64_t> sizes = segment_sizes(image_bytes);
  return std::accumulate(sizes.begin(), sizes.end(), uint64_t{0});
}

uint64_t SegmentRun::size_bytes() const {
  return std::accumulate(segments.begin(), segments.end(), uint64_t{0},
                         [](uint64_t sum, const Segment& segment) { return sum + segment.size_bytes(); });
}

Result<Segment> make_segment(uint64_t size_bytes, uid_t owner) {
  TRY_ASSIGN(SharedMemory memory, make_shared_memory("tensord-segment", size_bytes, alignment_of(size_bytes)));
  return Segment(std::move(memory), owner);
}

Result<SegmentRun> adopt_segments(std::vector<std::pair<base::Fd, uint64_t>> files) {
  SegmentRun run;
  for (auto& [fd, size_bytes] : files) {
    TRY_ASSIGN(Mapped mapped, map_shared_memory(fd, "a kept segment"));
    if (mapped.size_bytes() != size_bytes)
      return fail(Code::corrupt, "a kept segment has ", mapped.size_bytes(), " bytes, not ", size_bytes);
    run.segments.push_back(Segment({std::move(fd), std::move(mapped)}, kNobody));
  }
  TRY(place(run));
  return run;
}

Result<Segment> SegmentPool::take(uint64_t size_bytes, uid_t owner) {
  const auto found = std::find_if(kept_.rbegin(), kept_.rend(), [&](const Segment& segment) {
    return segment.size_bytes() == size_bytes && segment.owner() == owner;
  });
  if (found != kept_.rend()) {
    Segment segment = std::move(*found);
    kept_.erase(std::next(found).base());
    kept_bytes_ -= size_bytes;
    return segment;
  }
  return make_segment(size_bytes, owner);
}

Result<SegmentRun> SegmentPool::allocate(uint64_t image_bytes, uid_t owner) {
  const uint64_t size_bytes = memory_bytes(image_bytes);
  if (size_bytes > free_bytes()) {
    return fail(Code::exhausted, base::human_bytes(size_bytes), " do not fit: ", base::human_bytes(in_use_bytes_),
                " of host_memory ", base::human_bytes(limit_bytes_), " are in use");
  }
  SegmentRun run;
  const auto fill = [&]() -> Status {
    for (const uint64_t size : segment_sizes(image_bytes)) {
      TRY_ASSIGN(Segment segment, take(size, owner));
      run.segments.push_back(std::move(segment));
    }
    return place(run);
  };
  if (const Status filled = fill(); !filled) {
    // What is kept are pages: fresh segments have none.
    std::erase_if(run.segments, [](const Segment& segment) { return segment.touched_bytes() == 0; });
    for (Segment& segment : run.segments) keep(std::move(segment));
    return base::pass_on(filled);
  }
  in_use_bytes_ += size_bytes;
  return run;
}

void SegmentPool::free(SegmentRun run) {
  in_use_bytes_ -= run.size_bytes();
  for (Segment& segment : run.segments) keep(std::move(segment));
}

bool SegmentPool::claim(uint64_t size_bytes) {
  if (in_use_bytes_ + kept_bytes_ + size_bytes > limit_bytes_) return false;
  in_use_bytes_ += size_bytes;
  return true;
}

void SegmentPool::settle_claim(uint64_t size_bytes, std::optional<Segment> segment) {
  in_use_bytes_ -= size_bytes;
  if (segment) keep(std::move(*segment));
}

void SegmentPool::keep(Segment segment) {
  kept_bytes_ += segment.size_bytes();
  kept_.insert(segment.owner() == kNobody ? kept_.begin() : kept_.end(), std::move(segment));
}

std::vector<Segment> SegmentPool::trim(size_t kept_count_max) {
  const auto is_surplus = [&](const Segment& first) {
    return first.owner() == kNobody || kept_bytes_ > free_bytes() || kept_.size() > kept_count_max;
  };
  std::vector<Segment> surplus;
  while (!kept_.empty() && is_surplus(kept_.front())) {
    kept_bytes_ -= kept_.front().size_bytes();
    surplus.push_back(std::move(kept_.front()));
    kept_.pop_front();
  }
  return surplus;
}

}  // namespace tensord::memory
