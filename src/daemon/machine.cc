#include "daemon/machine.h"

#include <fcntl.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/bytes.h"
#include "base/fd.h"
#include "base/log.h"
#include "base/text.h"
#include "memory/copy.h"

namespace tensord::daemon {

using nlohmann::json;

constexpr uint64_t kFileBytesMax = 64 << 10;

std::string this_machine() {
  std::string cpu;
  std::ifstream cpus("/proc/cpuinfo");
  while (!cpu.starts_with("model name") && std::getline(cpus, cpu)) {
  }
  utsname kernel = {};
  ::uname(&kernel);
  return base::text(cpu.substr(cpu.find(": ") + 2), ", ", memory::usable_core_count(), " cores, Linux ",
                    std::string_view(kernel.release));
}

uint64_t cgroup_memory_limit(const std::string& groups_path, const std::string& cgroup_root) {
  constexpr std::string_view kFirst = ":memory:", kSecond = "0::";  // versions
  std::ifstream groups(groups_path);
  uint64_t lowest = UINT64_MAX;
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(kFirst);
    const bool second = line.starts_with(kSecond);
    if (!second && first == std::string::npos) continue;
    std::string group = second ? line.substr(kSecond.size()) : "/memory" + line.substr(first + kFirst.size());
    // In a container the tree may begin at its own group, and the names above it not exist: those are passed over.
    while (true) {
      for (const char* name : {"memory.max", "memory.high", "memory.limit_in_bytes"}) {
        std::ifstream file(cgroup_root + group + "/" + name);
        uint64_t limit = 0;
        if (file >> limit) lowest = std::min(lowest, limit);  // "max" is no number
      }
      const size_t slash = group.rfind('/');
      if (slash == std::string::npos) break;
      group.resize(slash);
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

std::string fastest_cached_path(const std::string& state_dir, const std::string& machine) {
  const std::string path = state_dir + "/machine.json";
  const base::Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd.valid()) return "";
  std::string problem = "it is of another machine or kernel";
  try {
    const json file = json::parse(base::read_file(fd.get(), kFileBytesMax, path).value_or(""));
    if (file.at("machine") == machine) return file.at("fastest_cached").get<std::string>();
  } catch (const json::exception& exception) {
    problem = exception.what();
  }
  base::log(base::LogLevel::warning, path, " is ignored: ", problem, "; `tensord doctor` writes it anew");
  return "";
}

}  // namespace tensord::daemon
