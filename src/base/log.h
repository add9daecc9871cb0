// Log lines with a level. Written by spdlog in log.cc alone, so that nobody else pays for its headers.
#pragma once

#include <string>
#include <string_view>

#include "base/result.h"
#include "base/text.h"

namespace tensord::base {

enum class LogLevel { trace, debug, info, warning, error, off };

// Where lines go: standard error, or a file when `path` is not empty (rotated at 10 MiB, 3 kept). Call once, first
// thing in main; before that, lines of level warning and above go to standard error.
Status start_log(LogLevel level, const std::string& path);

// Thread safe.
bool log_enabled(LogLevel level);
void log_line(LogLevel level, std::string_view line);

// log(LogLevel::info, "opened ", path, " in ", ms, " ms"): the parts are joined only when the level is on.
template <typename... Parts>
void log(LogLevel level, const Parts&... parts) {
  if (log_enabled(level)) log_line(level, text(parts...));
}

}  // namespace tensord::base
