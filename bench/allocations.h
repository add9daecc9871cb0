// Counts what this process takes from malloc: the whole program's calls go through allocations.cc.
#pragma once

#include <cstdint>

namespace tensord::bench {

struct AllocationCount {
  uint64_t all = 0;
  uint64_t large = 0;  // over 1 MiB
};

// Counts from its construction on, over all threads.
class AllocationWatch {
 public:
  AllocationWatch();
  AllocationCount count() const;
  static bool works();  // false in builds whose sanitizer owns malloc

 private:
  AllocationCount before_;
};

}  // namespace tensord::bench
