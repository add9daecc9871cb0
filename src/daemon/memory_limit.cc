#include "daemon/memory_limit.h"

#include <sys/sysinfo.h>

#include <algorithm>
#include <fstream>
#include <string_view>
#include <vector>

#include "base/bytes.h"

namespace tensord::daemon {

namespace {
// In a container the tree may begin at its own group, and the names above it not exist: those are passed over.
uint64_t lowest_up_to(const std::string& root, std::string group, const std::vector<const char*>& files) {
  uint64_t lowest = UINT64_MAX;
  while (true) {
    for (const char* name : files) {
      std::ifstream file(root + group + "/" + name);
      uint64_t limit = 0;
      if (file >> limit) lowest = std::min(lowest, limit);  // "max" is no number
    }
    const size_t slash = group.rfind('/');
    if (slash == std::string::npos) return lowest;
    group.resize(slash);
  }
}
}  // namespace

uint64_t cgroup_memory_limit(const std::string& groups_path, const std::string& cgroup_root) {
  std::ifstream groups(groups_path);
  std::string line;  // "0::/of/version/2" or "4:memory:/of/version/1"
  uint64_t lowest = UINT64_MAX;
  while (std::getline(groups, line)) {
    const size_t kinds = line.find(':') + 1;
    const size_t group = line.find(':', kinds) + 1;
    if (kinds == 0 || group == 0) continue;
    const std::string_view kind = std::string_view(line).substr(kinds, group - kinds - 1);
    if (kind.empty()) {
      lowest = std::min(lowest, lowest_up_to(cgroup_root, line.substr(group), {"memory.max", "memory.high"}));
    } else if (kind == "memory") {
      lowest = std::min(lowest,
                        lowest_up_to(cgroup_root + "/memory", line.substr(group), {"memory.limit_in_bytes"}));
    }
  }
  return lowest;
}

uint64_t most_within(uint64_t limit_bytes) {
  return limit_bytes - std::min(limit_bytes / 2, std::max(64 * base::kMiB, limit_bytes / 16));
}

uint64_t default_host_memory() {
  struct sysinfo machine;
  uint64_t bytes = UINT64_MAX;
  if (::sysinfo(&machine) == 0) bytes = static_cast<uint64_t>(machine.totalram) * machine.mem_unit;
  return std::min(bytes, cgroup_memory_limit()) / 2;
}

}  // namespace tensord::daemon
