// A source over memory, with scripted faults, for tests.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "storage/source.h"

namespace tensord::storage {

// What happens to a read that touches the byte at `offset` of `file`: the bytes before it arrive, then the
// error. Once per entry unless `always`.
struct Fault {
  uint32_t file = 0;
  uint64_t offset = 0;
  base::Error error;
  bool always = false;
};

struct MemorySourceOptions {
  std::vector<std::vector<std::byte>> files;
  std::vector<Fault> faults;  // the first that fits counts
  bool hold = false;          // reads wait until release_reads(); for tests of order and cancel
  bool changed = false;       // check_unchanged() fails
};

class MemorySource : public Source {
 public:
  // Completes held reads, oldest first (all, or the first `count`), on this thread.
  virtual void release_reads(size_t count = SIZE_MAX) = 0;
  virtual size_t held_count() const = 0;
};

// Reads that are not held are done when read() returns.
std::unique_ptr<MemorySource> make_memory_source(MemorySourceOptions options);

}  // namespace tensord::storage
