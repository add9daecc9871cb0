// Reads past the page cache, many at once: by io_uring where the kernel allows it (containers often block it), else by
// threads that wait.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "base/result.h"

namespace tensord::storage {

using base::Result;

// What O_DIRECT asks of offsets, sizes and addresses on every disk in use (some ask for 512 only).
inline constexpr uint64_t kDirectAlignment = 4096;
// Reads that the kernel has at a time; others wait here. 64 of 16 MiB are more than any disk needs to be busy.
inline constexpr uint32_t kDirectDepth = 64;
// Threads of the reader without io_uring: 4 reads of 16 MiB at once reached 0.98 of the best depth, 8 do no harm.
inline constexpr int kDirectThreads = 8;

// Thread safe.
class DirectReader {
 public:
  // Bytes read (fewer than asked for: carry on), 0 at the end of the file, or -errno. Called on a thread of the reader's
  // own: it should hand on, not work.
  using Done = std::function<void(int64_t result)>;

  virtual ~DirectReader() = default;  // every read must be done
  virtual const char* name() const = 0;
  virtual void read(int fd, std::byte* target, size_t size_bytes, uint64_t offset, Done done) = 0;
};

// Code::unsupported with the kernel's reason where io_uring cannot be had.
Result<std::unique_ptr<DirectReader>> start_uring_reader();
// Code::exhausted where the system refuses the threads.
Result<std::unique_ptr<DirectReader>> start_pread_reader(int thread_count = kDirectThreads);

}  // namespace tensord::storage
