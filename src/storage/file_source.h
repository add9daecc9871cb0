// Files read with pread by a pool of threads, in the order the reads were asked for.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/fd.h"
#include "storage/source.h"

namespace tensord::storage {

// Threads that run reads of any number of sources, oldest first. Thread safe.
class ReadPool {
 public:
  virtual ~ReadPool() = default;  // every source over it must be gone
  virtual int thread_count() const = 0;
  // Runs `work` on one of the threads. Never blocks: sources bound what they have in flight.
  virtual void post(std::function<void()> work) = 0;
};

// Starts the threads. Code::exhausted when the system refuses them.
Result<std::unique_ptr<ReadPool>> start_read_pool(int thread_count);

struct SourceFile {
  base::Fd fd;       // open for reading; a regular file
  std::string path;  // for messages
  base::FileIdentity identity;
};

// EINTR and short reads are retried; one read may exceed the kernel's 0x7ffff000 bytes.
// `pool` must outlive the source.
std::unique_ptr<Source> make_file_source(std::vector<SourceFile> files, ReadPool& pool);

}  // namespace tensord::storage
