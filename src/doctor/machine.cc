#include "doctor/machine.h"

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

namespace tensord::doctor {

using base::Code;
using base::fail;
using nlohmann::json;

namespace {

constexpr uint64_t kFileBytesMax = 64 << 10;
constexpr double kRateMax = 1e14;  // 100 TB/s: no memory is that fast

base::Result<Rates> parse_rates(const std::string& text, const std::string& machine) try {
  const json file = json::parse(text);
  if (file.at("machine") != machine) return fail(Code::changed, "it is of another machine or kernel");
  Rates rates;
  rates.bytes_per_s = file.at("bytes_per_s").get<decltype(rates.bytes_per_s)>();
  for (const auto& [name, rate] : rates.bytes_per_s) {
    if (!(rate >= 0 && rate <= kRateMax)) return fail(Code::corrupt, base::quoted(name) + " is no rate");
  }
  return rates;
} catch (const json::exception& exception) {
  return fail(Code::corrupt, exception.what());
}

}  // namespace

double Rates::of(std::string_view name) const {
  const auto found = bytes_per_s.find(name);
  return found == bytes_per_s.end() ? 0 : found->second;
}

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

std::string machine_file(const std::string& state_dir) { return state_dir + "/machine.json"; }

std::optional<Rates> load_rates(const std::string& state_dir, const std::string& machine) {
  const std::string path = machine_file(state_dir);
  const base::Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd.valid()) return std::nullopt;
  auto text = base::read_file(fd.get(), kFileBytesMax, path);
  const auto rates = text ? parse_rates(*text, machine) : base::Result<Rates>(base::pass_on(text));
  if (rates) return *rates;
  base::log(base::LogLevel::warning, path, " is ignored: ", rates.error().message, "; `tensord doctor` writes it anew");
  return std::nullopt;
}

}  // namespace tensord::doctor
