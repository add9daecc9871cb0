// What `tensord explain` shows of the daemon's report (docs/PROTOCOL.md, Reports). Pure: JSON in, text out.
// Code::internal when a document is not what PROTOCOL.md says.
#pragma once

#include <string>
#include <string_view>

#include "base/result.h"

namespace tensord::cli {

using base::Result;

// The phases over one time axis, what limited the load, and advice.
Result<std::string> explain_text(std::string_view report);

// One HTML page that draws the report and needs nothing else.
Result<std::string> explain_page(std::string_view report);

// Phases and spans in the Trace Event Format that Chrome's tracing page and Perfetto read; one track a phase or thread.
// Code::not_found when the daemon kept no spans.
Result<std::string> chrome_trace(std::string_view report);

// The report without its spans, and with where they were written.
Result<std::string> without_trace(std::string_view report, const std::string& trace_path);

}  // namespace tensord::cli
