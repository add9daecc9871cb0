// A source over memory, with scripted faults, for tests.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "storage/source.h"

namespace tensord::storage {

// What happens to a read that touches [offset, offset + 1) of `file`, once per entry unless `always`.
struct Fault {
  uint32_t file = 0;
  uint64_t offset = 0;
  base::Error error;
  bool always = false;
};

struct MemorySourceOptions {
  std::vector<std::vector<std::byte>> files;
  std::vector<Fault> faults;
  bool hold = false;     // reads wait until release_reads(); for tests of order and cancel
  bool changed = false;  // check_unchanged() fails
};

class MemorySource : public Source {
 public:
  // Completes held reads (all, or the first `count`).
  virtual void release_reads(size_t count = SIZE_MAX) = 0;
  virtual size_t held_count() const = 0;
};

std::unique_ptr<MemorySource> make_memory_source(MemorySourceOptions options);

}  // namespace tensord::storage
