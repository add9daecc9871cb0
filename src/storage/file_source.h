// Files, read in the order the reads were asked for: what lies in the page cache is taken from it, the rest goes past it.
//
//   request   [cached][not cached ..............][cached]
//   ways      pread    head | O_DIRECT ... | tail  pread       head, tail: < 4 KiB, by pread
//
//   pread     file ──► 256 KiB of the thread ──piece()──► streaming stores ──► target
//   mapping   file's pages ──────────────────piece()──► streaming stores ──► target
//   O_DIRECT  file ──────────────────────────► target ──piece()
#pragma once

#include <unistd.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/stream_copy.h"
#include "storage/direct_reader.h"
#include "storage/read_pool.h"
#include "storage/source.h"

namespace tensord::storage {

// What the kernel takes in one read: INT_MAX rounded down to a page (man 2 read, NOTES).
inline constexpr size_t kReadBytesMax = 0x7ffff000;
// The buffer between pread and streaming stores stays in the second-level cache. On Zen 3, two threads, with hashing:
// 16 KiB 0.80 of a bare pread, 64 KiB 0.90, 256 KiB 0.98; pread into the target, then hashing, 0.83.
inline constexpr size_t kPieceBytes = 256 << 10;
// Pages of a mapping that a thread takes and gives back at a time.
inline constexpr size_t kMappedBytes = 4 << 20;
// Hashing and storing take turns in pieces of the first-level cache.
inline constexpr size_t kHotBytes = 4 << 10;
// Whether bytes are cached is asked for stretches of this size.
inline constexpr uint64_t kStretchBytes = 1 << 20;
// Shorter stretches are not worth a direct read.
inline constexpr uint64_t kDirectBytesMin = 64 << 10;

// pread(2): a count, 0 at the end of the file, or -1 and errno.
using PreadFunction = std::function<ssize_t(int fd, void* target, size_t size_bytes, off_t offset)>;

// What stays in the page cache of bytes that were read: what the kernel keeps, or nothing.
enum class CacheLeft : uint8_t { keep, drop };
// How bytes come out of the page cache: through a buffer and streaming stores, by pread straight into the target, or from
// a mapping by streaming stores. `stream` and `mapped` only where base::can_stream().
enum class CachedPath : uint8_t { stream, plain, mapped };

struct FileSourceOptions {
  DirectReader* direct = nullptr;  // must outlive the source; nullptr: everything goes through the page cache
  std::string direct_note;         // why this reader, or why none
  CachedPath cached_path = base::can_stream() ? CachedPath::stream : CachedPath::plain;
  CacheLeft cache_left = CacheLeft::keep;
  PreadFunction pread = ::pread;
};

// EINTR and short reads are retried; a read above kReadBytesMax is cut. A file that refuses O_DIRECT, and one whose direct
// reads the system gives up, is read through the page cache, with a note. `pool` must outlive the source.
std::unique_ptr<Source> make_file_source(std::vector<SourceFile> files, ReadPool& pool, FileSourceOptions options = {});

}  // namespace tensord::storage
