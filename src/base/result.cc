#include "base/result.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>

namespace tensord::base {

std::string_view code_name(Code code) {
  static constexpr std::string_view kNames[] = {
      // by number
      "",        "not_found", "invalid_argument", "exhausted",   "unavailable", "cancelled",
      "corrupt", "changed",   "denied",           "unsupported", "internal"};
  return kNames[static_cast<size_t>(code_from(static_cast<uint32_t>(code)))];
}

Code code_from(uint32_t number) {
  const bool known = number >= 1 && number <= static_cast<uint32_t>(Code::internal);
  return known ? static_cast<Code>(number) : Code::internal;
}

namespace {
using CodeRow = std::pair<int, Code>;
constexpr CodeRow kCodes[] = {{ENOENT, Code::not_found},
                              {ENOTDIR, Code::not_found},
                              {EACCES, Code::denied},
                              {EROFS, Code::denied},
                              {EPERM, Code::denied},
                              {ENOMEM, Code::exhausted},
                              {ENOSPC, Code::exhausted},
                              {EDQUOT, Code::exhausted},
                              {EMFILE, Code::exhausted},
                              {ENFILE, Code::exhausted},
                              {EINVAL, Code::invalid_argument},
                              {EISDIR, Code::invalid_argument},
                              {ELOOP, Code::invalid_argument},
                              {ENAMETOOLONG, Code::invalid_argument},
                              {ENXIO, Code::invalid_argument}};
}  // namespace

Error errno_error(std::string_view what, int errno_value) {
  const auto row = std::ranges::find(kCodes, errno_value, &CodeRow::first);
  char text[128];
  return Error{row != std::end(kCodes) ? row->second : Code::unavailable,
               std::string(what) + ": " + strerror_r(errno_value, text, sizeof text)};
}

}  // namespace tensord::base
