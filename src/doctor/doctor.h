// `tensord doctor`: measures this machine the way the daemon and its clients work, and says what could be better.
#pragma once

#include <string>
#include <vector>

#include "doctor/machine.h"

namespace tensord::doctor {

// One line of what the doctor found.
struct Check {
  enum class Verdict : uint8_t { good, could_be_better, missing };
  std::string name;
  std::string value;
  Verdict verdict = Verdict::good;
  std::string advice;  // what to do; empty where it is good
};

struct Effort {
  uint64_t size_bytes = 256 << 20;  // of each memory and of the file; less where memory is short
  int round_count = 5;
};

// The median of several short runs of each measurement, in turn; at most 15 s. `path` is a folder, for a scratch file
// in it that is gone at once, or a file to read, whose pages leave the cache. Code::exhausted when not even the least
// memory can be had.
base::Result<Rates> measure(const std::string& path, const Effort& effort = {});

// A line for each rate. Pure.
std::vector<Check> judge(const Rates& rates);

// What the system allows: huge pages, io_uring, limits.
std::vector<Check> look_around();

}  // namespace tensord::doctor
