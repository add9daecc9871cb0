// `tensord top`: what the daemon does, second by second.
#pragma once

#include <string>
#include <string_view>

#include "cli/verbs.h"

namespace tensord::cli {

// One JSON document out of the daemon's answers to status and list, with rates since `before` (an earlier document, ""
// for none). Pure, as the next two. Code::internal as reports.h.
Result<std::string> top_sample(std::string_view status, std::string_view list, std::string_view before,
                               double now_s);

// Fills a screen of that size at most.
Result<std::string> top_screen(std::string_view sample, size_t width, size_t height);
// The totals in one line.
Result<std::string> top_line(std::string_view sample);

// Until --count is reached, `q` or SIGINT (kDone), or the daemon is gone (kNoDaemon). On a terminal it takes the screen
// and gives it back however it ends. Prints by itself.
Result<Output> run_top(const Words& words);

}  // namespace tensord::cli
