// Which bytes of a file lie in the page cache.
#pragma once

#include <cstdint>

namespace tensord::storage {

// Whether all of [offset, offset + size_bytes) is in the page cache: by cachestat(2) (Linux 6.5, files that the caller
// may write), else by trying one byte every kProbeBytes with RWF_NOWAIT. A try that misses makes the kernel read one
// page where `fd` is under POSIX_FADV_RANDOM. A guess all the same: pages come and go.
bool is_cached(int fd, uint64_t offset, uint64_t size_bytes);

inline constexpr uint64_t kProbeBytes = 256 << 10;

}  // namespace tensord::storage
