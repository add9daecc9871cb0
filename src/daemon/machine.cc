#include "daemon/machine.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/fd.h"
#include "base/log.h"

namespace tensord::daemon {

using base::Code;
using base::fail;
using nlohmann::json;

namespace {

constexpr int kFileVersion = 1;
constexpr uint64_t kFileBytesMax = 64 << 10;
constexpr double kRateMax = 1e14;  // 100 TB/s: no memory is that fast

constexpr NamedRate kRates[] = {
    {"memcpy_1", &MachineRates::memcpy_1, "memory copy, 1 thread"},
    {"memcpy_all", &MachineRates::memcpy_all, "memory copy, all cores"},
    {"gather_all", &MachineRates::gather_all, "gather, rows of 5 KiB"},
    {"fresh_4k", &MachineRates::fresh_4k, "first touch, 4 KiB pages"},
    {"fresh_huge", &MachineRates::fresh_huge, "first touch, huge pages"},
    {"cache_pread", &MachineRates::cache_pread, "page cache, pread"},
    {"cache_stream", &MachineRates::cache_stream, "page cache, streamed"},
    {"disk_direct", &MachineRates::disk_direct, "disk, O_DIRECT"},
    {"disk_buffered", &MachineRates::disk_buffered, "disk, buffered"},
    {"hash_1", &MachineRates::hash_1, "hash, 1 thread"},
};

base::Result<MachineRates> read_rates(int fd, const std::string& path, const Machine& machine) {
  TRY_ASSIGN(const std::string text, base::read_file(fd, kFileBytesMax, path));
  const json file = json::parse(text, nullptr, false);
  if (!file.is_object()) return fail(Code::corrupt, "it is no JSON object");
  if (file.value("version", json()) != kFileVersion)
    return fail(Code::unsupported, "it is of another version");
  const json of = {{"cpu", machine.cpu}, {"core_count", machine.core_count}, {"kernel", machine.kernel}};
  if (file.value("machine", json()) != of) return fail(Code::changed, "it is of another machine or kernel");
  MachineRates rates;
  for (const NamedRate& named : kRates) {
    const json value = file.value("rates", json::object()).value(named.name, json());
    const double rate = value.is_number() ? value.get<double>() : -1;
    if (!(rate >= 0 && rate <= kRateMax)) return fail(Code::corrupt, base::text(named.name, " is no rate"));
    rates.*named.rate = rate;
  }
  return rates;
}

}  // namespace

std::span<const NamedRate> named_rates() { return kRates; }

Machine this_machine() {
  Machine machine;
  std::ifstream cpus("/proc/cpuinfo");
  for (std::string line; machine.cpu.empty() && std::getline(cpus, line);) {
    if (line.starts_with("model name")) machine.cpu = line.substr(line.find(": ") + 2);
  }
  cpu_set_t cores;
  machine.core_count = ::sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
  utsname kernel;
  if (::uname(&kernel) == 0) machine.kernel = kernel.release;
  return machine;
}

std::string machine_file(const std::string& state_dir) { return state_dir + "/machine.json"; }

std::optional<MachineRates> load_rates(const std::string& state_dir, const Machine& machine) {
  const std::string path = machine_file(state_dir);
  const base::Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd.valid() && (errno == ENOENT || errno == ENOTDIR)) return std::nullopt;
  base::Result<MachineRates> rates = tl::unexpected(base::errno_error("open it", errno));
  try {
    if (fd.valid()) rates = read_rates(fd.get(), path, machine);
  } catch (const json::exception& exception) {
    rates = fail(Code::corrupt, exception.what());
  }
  if (rates) return *rates;
  base::log(base::LogLevel::warning, path, " is ignored: ", rates.error().message,
            "; `tensord doctor` writes it anew");
  return std::nullopt;
}

base::Status save_rates(const std::string& state_dir, const Machine& machine, const MachineRates& rates) {
  json values = json::object();
  for (const NamedRate& named : kRates) values[named.name] = std::round(rates.*named.rate);
  const json file = {
      {"version", kFileVersion},
      {"machine", {{"cpu", machine.cpu}, {"core_count", machine.core_count}, {"kernel", machine.kernel}}},
      {"measured_at", static_cast<int64_t>(std::time(nullptr))},
      {"unit", "bytes/s"},
      {"rates", values}};
  const std::string text = file.dump(2, ' ', false, json::error_handler_t::replace) + "\n";
  const std::string path = machine_file(state_dir);
  const std::string part = path + ".part";
  const base::Fd fd(::open(part.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd.valid() || ::write(fd.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size()) ||
      ::fsync(fd.get()) != 0 || ::rename(part.c_str(), path.c_str()) != 0) {
    const base::Error error = base::errno_error(base::text("write ", path), errno);
    ::unlink(part.c_str());
    return tl::unexpected(error);
  }
  return {};
}

}  // namespace tensord::daemon
