// Completion scripts for shells, written from the table of verbs. What `tensord serve` accepts is asked of
// the program when it is needed, as the daemon's flags are not in the table.
#pragma once

#include <string>
#include <string_view>

#include "base/result.h"

namespace tensord::cli {

// "bash", "zsh" or "fish"; Code::invalid_argument lists them.
base::Result<std::string> completion_script(std::string_view shell);

}  // namespace tensord::cli
