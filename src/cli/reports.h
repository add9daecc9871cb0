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

// "evicted", 'pinned' ... -> "evicted replica 1 (/models/a, 2.00 GiB)\n"
Result<std::string> replica_text(std::string_view done, std::string_view report);

// What Model::info_json() says of a load.
Result<std::string> load_text(std::string_view info);

struct Verified {
  std::string text;
  bool sound = false;  // every leaf is what its digest says
};
Result<Verified> verify_text(std::string_view report);

// {"error": {"code": "not_found", "message": "..."}}
std::string error_json(const base::Error& error);

}  // namespace tensord::cli
