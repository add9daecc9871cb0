#include "base/log.h"

// Header-only here, in this one file: Debian has no static archive of spdlog or fmt.
#define SPDLOG_HEADER_ONLY
#define SPDLOG_FMT_EXTERNAL
#define FMT_HEADER_ONLY
#include <spdlog/sinks/rotating_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <array>
#include <utility>

namespace tensord::base {

namespace {
constexpr std::array<std::pair<std::string_view, spdlog::level::level_enum>, 6> kLevels = {{
    {"trace", spdlog::level::trace},
    {"debug", spdlog::level::debug},
    {"info", spdlog::level::info},
    {"warning", spdlog::level::warn},
    {"error", spdlog::level::err},
    {"off", spdlog::level::off},
}};
constexpr size_t kLogFileBytesMax = 10 << 20;
constexpr size_t kLogFileCount = 3;

// Lines before start_log: kept quiet below warning, so that a library user sees no chatter.
std::shared_ptr<spdlog::logger>& logger() {
  static std::shared_ptr<spdlog::logger> instance = [] {
    auto quiet = std::make_shared<spdlog::logger>("tensord", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    quiet->set_level(spdlog::level::warn);
    return quiet;
  }();
  return instance;
}
}  // namespace

Result<LogLevel> parse_log_level(std::string_view name) {
  for (size_t at = 0; at < kLevels.size(); ++at) {
    if (kLevels[at].first == name) return static_cast<LogLevel>(at);
  }
  return fail(Code::invalid_argument, "log level '", name, "': one of trace, debug, info, warning, error, off");
}

Status start_log(LogLevel level, const std::string& path) try {
  std::shared_ptr<spdlog::sinks::sink> sink;
  if (path.empty()) {
    sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  } else {
    sink = std::make_shared<spdlog::sinks::rotating_file_sink_mt>(path, kLogFileBytesMax, kLogFileCount);
  }
  auto started = std::make_shared<spdlog::logger>("tensord", std::move(sink));
  started->set_pattern("%Y-%m-%dT%H:%M:%S.%e %^%l%$ %v");
  started->set_level(kLevels[static_cast<size_t>(level)].second);
  started->flush_on(spdlog::level::info);
  logger() = std::move(started);
  return {};
} catch (const std::exception& problem) {
  return fail(Code::unavailable, "open log file ", path, ": ", problem.what());
}

bool log_enabled(LogLevel level) { return logger()->should_log(kLevels[static_cast<size_t>(level)].second); }

void log_line(LogLevel level, std::string_view line) {
  logger()->log(kLevels[static_cast<size_t>(level)].second, "{}", line);
}

}  // namespace tensord::base
