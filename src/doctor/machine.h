// This machine: the memory it leaves for weights, and what it can do as `tensord doctor` measured it: STATE/machine.json.
//
//   cgroup limit   [ host_memory, at most                              | headroom ]
//                                                                      headroom: 1/16 of the limit, at least 64 MiB
//
// The headroom is for what is charged to the same cgroup and is no weight: the daemon itself (some 10 MiB, and 1/512 of
// host_memory in page tables), and what the clients use. It is at most half of the limit.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "base/result.h"

namespace tensord::doctor {

// Bytes a second, by the names in cli/doctor.py of the Python package.
struct Rates {
  std::map<std::string, double, std::less<>> bytes_per_s;
  // 0 where it was not measured or cannot be had.
  double of(std::string_view name) const;
};

// "AMD EPYC 9654, 96 cores, Linux 6.1.0": what the rates are true for. The cores are those that this process may run on.
std::string this_machine();

// The lowest of memory.max and memory.high (version 2) and memory.limit_in_bytes (version 1) from the groups named in
// `groups_path` up to the root, below the mounted tree `cgroup_root`; UINT64_MAX where nothing limits. What cannot be
// read limits nothing.
uint64_t cgroup_memory_limit(const std::string& groups_path = "/proc/self/cgroup",
                             const std::string& cgroup_root = "/sys/fs/cgroup");

// The most that host_memory may be within such a limit.
uint64_t most_within(uint64_t limit_bytes);

// Half of what the cgroup or the machine allows.
uint64_t default_host_memory();

std::string machine_file(const std::string& state_dir);

// nullopt where there is no file; a file that is damaged, or of another machine, is ignored with a log line.
std::optional<Rates> load_rates(const std::string& state_dir, const std::string& machine);

}  // namespace tensord::doctor
