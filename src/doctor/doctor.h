// `tensord measure`: measures this machine the way the daemon and its clients work. What the figures are worth, `tensord
// doctor` of the Python package says.
#pragma once

#include <string>

#include "doctor/machine.h"

namespace tensord::doctor {

struct Effort {
  uint64_t size_bytes = 256 << 20;  // of each memory and of the file; less where memory is short
  int round_count = 5;
};

// The median of several short runs of each measurement, in turn; at most 15 s. `path` is a folder, for a scratch file
// in it that is gone at once, or a file to read, whose pages leave the cache. Code::exhausted when not even the least
// memory can be had.
base::Result<Rates> measure(const std::string& path, const Effort& effort = {});

// `argv[0]` is the verb, `argv[1]` a path for measure() (default: the state folder). Prints one JSON document:
// machine, bytes_per_s, problems, memory_limit_bytes (null: none), machine_file (where the first two are to be kept); or
// error. Returns the exit status: 0 done, 1 it failed, 2 the command line makes no sense.
int measure_main(int argc, char** argv);

}  // namespace tensord::doctor
