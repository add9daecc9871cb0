// Files read with pread by a pool of threads, in the order the reads were asked for.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/fd.h"
#include "storage/read_pool.h"
#include "storage/source.h"

namespace tensord::storage {

struct SourceFile {
  base::Fd fd;                  // open for reading; a regular file
  std::string path;             // for messages
  base::FileIdentity identity;  // reads end at its size, also when the file grew since
};

// What the kernel takes in one read: INT_MAX rounded down to a page (man 2 read, NOTES).
inline constexpr size_t kReadBytesMax = 0x7ffff000;

// pread(2): a count, 0 at the end of the file, or -1 and errno.
using PreadFunction = std::function<ssize_t(int fd, void* target, size_t size_bytes, off_t offset)>;
PreadFunction system_pread();

// EINTR and short reads are retried; a read above kReadBytesMax is cut. `pool` must outlive the source.
std::unique_ptr<Source> make_file_source(std::vector<SourceFile> files, ReadPool& pool,
                                         PreadFunction pread = system_pread());

}  // namespace tensord::storage
