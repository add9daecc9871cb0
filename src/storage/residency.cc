#include "storage/residency.h"

#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <optional>

namespace tensord::storage {

namespace {

// As linux/mman.h of 6.5 and newer has them.
constexpr long kCachestatCall = 451;
struct CachestatRange {
  uint64_t offset;
  uint64_t size_bytes;
};
struct Cachestat {
  uint64_t cached_pages;
  uint64_t dirty_pages;
  uint64_t writeback_pages;
  uint64_t evicted_pages;
  uint64_t recently_evicted_pages;
};

std::optional<bool> ask_cachestat(int fd, uint64_t offset, uint64_t size_bytes) {
  CachestatRange range{offset, size_bytes};
  Cachestat found{};
  if (::syscall(kCachestatCall, fd, &range, &found, 0u) != 0) return std::nullopt;
  const auto page_bytes = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  const uint64_t page_count = (offset + size_bytes - 1) / page_bytes - offset / page_bytes + 1;
  return found.cached_pages >= page_count;
}

bool has_byte(int fd, uint64_t offset) {
  char byte = 0;
  const iovec into{&byte, 1};
  return ::preadv2(fd, &into, 1, static_cast<off_t>(offset), RWF_NOWAIT) == 1;
}

}  // namespace

bool is_cached(int fd, uint64_t offset, uint64_t size_bytes) {
  if (size_bytes == 0) return true;
  if (const auto told = ask_cachestat(fd, offset, size_bytes)) return *told;
  for (uint64_t at = 0; at < size_bytes; at += kProbeBytes) {
    if (!has_byte(fd, offset + at)) return false;
  }
  return has_byte(fd, offset + size_bytes - 1);
}

}  // namespace tensord::storage
