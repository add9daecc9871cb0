#include "base/log.h"

// Header-only here, in this one file: Debian has no static archive of spdlog or fmt.
#define SPDLOG_HEADER_ONLY
#define SPDLOG_FMT_EXTERNAL
#define FMT_HEADER_ONLY
#include <spdlog/sinks/rotating_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

namespace tensord::base {

namespace {
// By LogLevel.
constexpr spdlog::level::level_enum kLevels[] = {spdlog::level::trace, spdlog::level::debug, spdlog::level::info,
                                                 spdlog::level::warn,  spdlog::level::err,   spdlog::level::off};
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

Status start_log(LogLevel level, const std::string& path) try {
  std::shared_ptr<spdlog::sinks::sink> sink;
  if (path.empty()) {
    sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  } else {
    sink = std::make_shared<spdlog::sinks::rotating_file_sink_mt>(path, kLogFileBytesMax, kLogFileCount);
  }
  auto started = std::make_shared<spdlog::logger>("tensord", std::move(sink));
  started->set_pattern("%Y-%m-%dT%H:%M:%S.%e %^%l%$ %v");
  started->set_level(kLevels[static_cast<size_t>(level)]);
  started->flush_on(spdlog::level::info);
  logger() = std::move(started);
  return {};
} catch (const std::exception& problem) {
  return fail(Code::unavailable, "open log file ", path, ": ", problem.what());
}

bool log_enabled(LogLevel level) { return logger()->should_log(kLevels[static_cast<size_t>(level)]); }

void log_line(LogLevel level, std::string_view line) { logger()->log(kLevels[static_cast<size_t>(level)], "{}", line); }

}  // namespace tensord::base
