// What this machine can do, as `tensord doctor` measured it: STATE/machine.json.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "base/result.h"

namespace tensord::doctor {

// Bytes a second, by the names of measurements() in doctor.h.
struct Rates {
  std::map<std::string, double, std::less<>> bytes_per_s;
  // 0 where it was not measured or cannot be had.
  double of(std::string_view name) const;
};

// "AMD EPYC 9654, 96 cores, Linux 6.1.0": what the rates are true for. The cores are those that this process may run on.
std::string this_machine();
int core_count();

// The lowest limit in files of that name (memory.max, memory.high) from this process's cgroup (v2) up to the root;
// UINT64_MAX where there is none.
uint64_t cgroup_memory(const char* file_name);

std::string machine_file(const std::string& state_dir);

// nullopt where there is no file; a file that is damaged, or of another machine, is ignored with a log line.
std::optional<Rates> load_rates(const std::string& state_dir, const std::string& machine);

// Replaces the file at once or not at all.
base::Status save_rates(const std::string& state_dir, const std::string& machine, const Rates& rates);

}  // namespace tensord::doctor
