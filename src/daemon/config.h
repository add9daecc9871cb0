// Configuration of the daemon: one table of names for flags, file and environment.
//
//   later wins:   default < tensord.toml < environment < flag
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/log.h"
#include "base/result.h"
#include "daemon/device_copies.h"
#include "memory/fresh_pages.h"
#include "storage/file_source.h"

namespace tensord::daemon {

using base::Result;

// How bytes that are in no cache are read: io_uring and O_DIRECT where they can be had, or what is named.
enum class DiskReads : uint8_t { best, io_uring, pread, buffered };

inline constexpr int64_t kMemoryWaitSecondsMax = 300;  // clients give up on an answer after 600 s

struct Config {
  std::string runtime_dir;
  std::string state_dir;
  uint64_t host_memory = 0;
  bool host_memory_is_default = true;
  int64_t memory_wait_seconds = 30;
  uint64_t prefault = 0;
  int read_threads = 0;
  DiskReads disk_reads = DiskReads::best;
  storage::CacheLeft cache = storage::CacheLeft::keep;
  memory::HugePages huge_pages = memory::HugePages::wanted;
  base::LogLevel log_level = base::LogLevel::info;
  std::string log_file;
  int64_t drain_seconds = 10;
  GpuUse gpu = GpuUse::automatic;
  uint64_t gpu_memory = 0;
  int64_t gpu_idle_seconds = 60;
};

// One setting: --host-memory, host_memory in the file, $TENSORD_HOST_MEMORY. What each means, python/tensord/cli/serve.py
// and docs/OPERATING.md say.
struct Setting {
  const char* name;  // as in the file; flags and environment derive from it
  std::function<base::Status(Config& config, const std::string& value)> set;
};
const std::vector<Setting>& settings();

struct CommandLine {
  bool help = false;
  bool detach = false;
  std::string config_path;  // --config; else $TENSORD_CONFIG, else ~/.config/tensord/tensord.toml when it exists
  std::vector<std::pair<const Setting*, std::string>> flags;
};
// Code::invalid_argument names the argument.
Result<CommandLine> parse_command_line(std::span<char*> arguments);

// Defaults, file, environment and flags together. A file that was named but cannot be read, a name that is not known,
// a value that makes no sense: Code::not_found or Code::invalid_argument, naming where it stands.
Result<Config> make_config(const CommandLine& command_line);

// For who has the compiled program alone: the flags there are.
std::string serve_help();

}  // namespace tensord::daemon
