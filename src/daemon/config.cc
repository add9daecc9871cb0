#include "daemon/config.h"

#include <fcntl.h>
#include <unistd.h>

#include <toml++/toml.h>
#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <string_view>

#include "base/bytes.h"
#include "base/fd.h"
#include "base/folders.h"
#include "base/text.h"
#include "daemon/machine.h"
#include "memory/copy.h"
#include "rpc/unix_socket.h"

namespace tensord::daemon {

using base::Code;
using base::fail;
using base::Status;

namespace {

using Set = decltype(Setting::set);

Set text(std::string Config::*field) {
  return [field](Config& config, const std::string& value) -> Status {
    config.*field = value;
    return {};
  };
}

Set bytes(uint64_t Config::*field) {
  return [field](Config& config, const std::string& value) -> Status {
    TRY_ASSIGN(config.*field, base::parse_bytes(value));
    return {};
  };
}

template <typename Number>
Set number(Number Config::*field, int64_t least, int64_t most) {
  return [=](Config& config, const std::string& value) -> Status {
    int64_t number = 0;
    const auto [rest, problem] = std::from_chars(value.data(), value.data() + value.size(), number);
    if (problem != std::errc() || rest != value.data() + value.size() || number < least || number > most) {
      return fail(Code::invalid_argument, base::quoted(value), " is no whole number from ", least, " to ", most);
    }
    config.*field = static_cast<Number>(number);
    return {};
  };
}

// One of the names, which stand in the order of the enumeration.
template <typename Choice>
Set choice(Choice Config::*field, std::vector<std::string> names) {
  return [=](Config& config, const std::string& value) -> Status {
    const auto found = std::find(names.begin(), names.end(), value);
    if (found == names.end()) {
      std::string all;
      for (const std::string& name : names) all += (all.empty() ? "" : ", ") + name;
      return fail(Code::invalid_argument, base::quoted(value), " is none of ", all);
    }
    config.*field = static_cast<Choice>(found - names.begin());
    return {};
  };
}

constexpr int kReadThreadsMax = 256;
constexpr int64_t kDrainSecondsMax = 3600;
constexpr int64_t kGpuIdleSecondsMax = 86'400;

std::string name_of(const Setting& setting) { return setting.name; }

std::string flag_of(const Setting& setting) {
  std::string flag = "--" + std::string(setting.name);
  std::replace(flag.begin(), flag.end(), '_', '-');
  return flag;
}

std::string variable_of(const Setting& setting) {
  std::string variable = "TENSORD_" + std::string(setting.name);
  std::transform(variable.begin(), variable.end(), variable.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  return variable;
}

// The setting that one of the three functions above spells so; nullptr: there is none.
const Setting* find_setting(std::string_view spelled, std::string (*spell)(const Setting&)) {
  for (const Setting& setting : settings()) {
    if (spell(setting) == spelled) return &setting;
  }
  return nullptr;
}

Status apply(Config& config, const Setting& setting, const std::string& value, const std::string& where) {
  return setting.set(config, value).map_error([&](const base::Error& error) {
    return base::Error{error.code, where + ": " + error.message};
  });
}

std::string value_text(const toml::node& node) {
  if (const auto* text = node.as_string()) return text->get();
  if (const auto* number = node.as_integer()) return std::to_string(number->get());
  return "";
}

Status apply_file(Config& config, const std::string& path) try {
  const toml::table table = toml::parse_file(path);
  for (const auto& [key, node] : table) {
    const std::string where = base::text(path, ":", node.source().begin.line, ": ", key.str());
    const Setting* setting = find_setting(key.str(), name_of);
    if (setting == nullptr)
      return fail(Code::invalid_argument, where + ": no such setting; see `tensord serve --help`");
    const std::string value = value_text(node);
    if (value.empty()) return fail(Code::invalid_argument, where + ": write a string or a whole number");
    TRY(apply(config, *setting, value, where));
  }
  return {};
} catch (const toml::parse_error& problem) {
  return fail(Code::invalid_argument, path, ":", problem.source().begin.line, ": ", problem.description());
}

std::string usual_config_path() {
  const std::string home = base::environment("XDG_CONFIG_HOME");
  return (home.empty() ? base::environment("HOME") + "/.config" : home) + "/tensord/tensord.toml";
}

int default_read_threads() {
  constexpr int kEnough = 16;  // page cache reads of a 16-core server no longer gain from more
  return std::clamp(memory::usable_core_count(), 1, kEnough);
}

}  // namespace

const std::vector<Setting>& settings() {
  static const std::vector<Setting> all = {
      {"runtime_dir", text(&Config::runtime_dir)},
      {"state_dir", text(&Config::state_dir)},
      {"host_memory",
       [](Config& config, const std::string& value) {
         config.host_memory_is_default = false;
         return bytes(&Config::host_memory)(config, value);
       }},
      {"memory_wait_seconds", number(&Config::memory_wait_seconds, 0, kMemoryWaitSecondsMax)},
      {"prefault", bytes(&Config::prefault)},
      {"read_threads", number(&Config::read_threads, 1, kReadThreadsMax)},
      {"disk_reads", choice(&Config::disk_reads, {"best", "io_uring", "pread", "buffered"})},
      {"cache", choice(&Config::cache, {"keep", "drop"})},
      {"huge_pages", choice(&Config::huge_pages, {"auto", "never"})},
      {"gpu", choice(&Config::gpu, {"auto", "off"})},
      {"gpu_memory", bytes(&Config::gpu_memory)},
      {"gpu_idle_seconds", number(&Config::gpu_idle_seconds, 0, kGpuIdleSecondsMax)},
      {"log_level", choice(&Config::log_level, {"trace", "debug", "info", "warning", "error", "off"})},
      {"log_file", text(&Config::log_file)},
      {"drain_seconds", number(&Config::drain_seconds, 0, kDrainSecondsMax)},
  };
  return all;
}

Result<CommandLine> parse_command_line(std::span<char*> arguments) {
  CommandLine line;
  for (auto argument = arguments.begin(); argument != arguments.end(); ++argument) {
    const std::string word = *argument;
    if (word == "--help" || word == "-h") {
      line.help = true;
      continue;
    }
    if (word == "--detach") {
      line.detach = true;
      continue;
    }
    const size_t equals = word.find('=');
    const std::string flag = word.substr(0, equals);
    const Setting* setting = find_setting(flag, flag_of);
    if (setting == nullptr && flag != "--config") {
      return fail(Code::invalid_argument, "no flag ", base::quoted(flag), "; see `tensord serve --help`");
    }
    if (equals == std::string::npos && ++argument == arguments.end())
      return fail(Code::invalid_argument, flag + " needs a value");
    const std::string value = equals == std::string::npos ? *argument : word.substr(equals + 1);
    if (flag == "--config") {
      line.config_path = value;
    } else {
      line.flags.emplace_back(setting, value);
    }
  }
  return line;
}

Result<Config> make_config(const CommandLine& command_line) {
  Config config;
  config.runtime_dir = rpc::runtime_folder();
  config.state_dir = base::state_folder();
  config.host_memory = default_host_memory();
  config.read_threads = default_read_threads();
  const std::string variable = base::environment("TENSORD_CONFIG");
  const bool by_variable = command_line.config_path.empty() && !variable.empty();
  const std::string named = by_variable ? variable : command_line.config_path;
  const std::string path = named.empty() ? usual_config_path() : named;
  const base::Fd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.valid() && base::identify_file(file.get(), path)) {
    TRY(apply_file(config, path));
  } else if (!named.empty()) {
    return fail(Code::not_found, by_variable ? "$TENSORD_CONFIG " : "--config ", path, ": cannot be read");
  }
  for (const Setting& setting : settings()) {
    const std::string name = variable_of(setting);
    const std::string value = base::environment(name.c_str());
    if (!value.empty()) TRY(apply(config, setting, value, "$" + name));
  }
  for (const auto& [setting, value] : command_line.flags) TRY(apply(config, *setting, value, flag_of(*setting)));
  if (config.prefault > config.host_memory) {
    return fail(Code::invalid_argument, "prefault (", base::human_bytes(config.prefault),
                ") is more than host_memory (", base::human_bytes(config.host_memory), ")");
  }
  // --detach leaves the working folder.
  for (std::string* one : {&config.runtime_dir, &config.state_dir, &config.log_file}) {
    if (!one->empty()) *one = std::filesystem::absolute(*one).string();
  }
  return config;
}

std::string serve_help() {
  std::string help = "usage: tensord serve [--config FILE] [--detach] [FLAG VALUE ...]\nflags:";
  for (const Setting& setting : settings()) help += " " + flag_of(setting);
  return help + "\n`tensord help serve` of the Python package and docs/OPERATING.md tell what they mean\n";
}

}  // namespace tensord::daemon
