// The daemon's answers (docs/PROTOCOL.md, Reports) as text for people. Pure: JSON in, text out.
// Code::internal when a document is not what PROTOCOL.md says.
#pragma once

#include <string>
#include <string_view>

#include "base/result.h"

namespace tensord::cli {

using base::Result;

Result<std::string> status_text(std::string_view report);
Result<std::string> list_text(std::string_view report);

// The phases of a load over one time axis, what limited it, and advice.
Result<std::string> explain_text(std::string_view report);
// One HTML page that draws an `explain` report and needs nothing else.
Result<std::string> explain_page(std::string_view report);
// Its phases and spans in the Trace Event Format that Chrome's tracing page and Perfetto read; one track each phase and
// thread. Code::not_found when the daemon kept no spans.
Result<std::string> chrome_trace(std::string_view report);
// The report without its spans, and with where they were written.
Result<std::string> without_trace(std::string_view report, const std::string& trace_path);

// "evicted", 'pinned' ... -> "evicted replica 1 (/models/a, 2.00 GiB)\n"
Result<std::string> replica_text(std::string_view done, std::string_view report);

// What Model::info_json() says of a load.
Result<std::string> load_text(std::string_view info);

struct Verified {
  std::string text;
  bool sound = false;  // every leaf is what its digest says
};
Result<Verified> verify_text(std::string_view report);

// The answer to status with its replicas as `list` has them, and with rates since `before` (the look before this one;
// empty: none).
Result<std::string> take_look(std::string_view status, std::string_view list, std::string_view before,
                              double now_s);
struct LookText {
  std::string line;    // the totals
  std::string screen;  // and all loads and replicas
};
Result<LookText> look_text(std::string_view look);

// {"error": {"code": "not_found", "message": "..."}}
std::string error_json(const base::Error& error);

}  // namespace tensord::cli
