// What this machine can do, as `tensord doctor` measured it: STATE/machine.json.
#pragma once

#include <optional>
#include <span>
#include <string>

#include "base/result.h"

namespace tensord::daemon {

// Bytes a second; 0 where it was not measured or cannot be had.
struct MachineRates {
  double memcpy_1 = 0;       // one thread, memory to memory
  double memcpy_all = 0;     // a thread for each core, as everything below
  double gather_all = 0;     // rows of 5 KiB out of rows of 10 KiB
  double fresh_4k = 0;       // first touch of shared memory in pages of 4 KiB
  double fresh_huge = 0;     // in huge pages
  double cache_pread = 0;    // page cache to touched memory
  double cache_stream = 0;   // the same through a small buffer and streaming stores
  double disk_direct = 0;    // O_DIRECT
  double disk_buffered = 0;  // through the page cache, which did not hold it
  double hash_1 = 0;         // XXH3-128, one thread
};

struct NamedRate {
  const char* name;
  double MachineRates::*rate;
  const char* meaning;
};
std::span<const NamedRate> named_rates();

// What the rates are true for.
struct Machine {
  std::string cpu;
  int core_count = 0;  // that this process may run on
  std::string kernel;
  bool operator==(const Machine&) const = default;
};
Machine this_machine();

std::string machine_file(const std::string& state_dir);

// nullopt where there is no file; a file that is damaged, or of another machine or version, is ignored with a log line.
std::optional<MachineRates> load_rates(const std::string& state_dir, const Machine& machine);

// Replaces the file at once or not at all.
base::Status save_rates(const std::string& state_dir, const Machine& machine, const MachineRates& rates);

}  // namespace tensord::daemon
