// This machine: the memory it leaves for weights, and what `tensord doctor` found out of it: STATE/machine.json.
//
//   cgroup limit   [ host_memory, at most                              | headroom ]
//                                                                      headroom: 1/16 of the limit, at least 64 MiB
//
// The headroom is for what is charged to the same cgroup and is no weight: the daemon itself (some 10 MiB, and 1/512 of
// host_memory in page tables), and what the clients use. It is at most half of the limit.
#pragma once

#include <cstdint>
#include <string>

namespace tensord::daemon {

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

// As which measurement (cache_pread, cache_stream, cache_mapped) this machine reads cached bytes fastest; empty where the
// doctor has not measured it. A file that is damaged, or of another machine, is ignored with a log line.
std::string fastest_cached_path(const std::string& state_dir, const std::string& machine);

}  // namespace tensord::daemon
