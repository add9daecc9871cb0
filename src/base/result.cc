#include "base/result.h"

#include <cerrno>
#include <cstring>

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
Code code_of(int errno_value) {
  switch (errno_value) {
    case ENOENT:
    case ENOTDIR:
      return Code::not_found;
    case EACCES:
    case EROFS:
    case EPERM:
      return Code::denied;
    case ENOMEM:
    case ENOSPC:
    case EDQUOT:
    case EMFILE:
    case ENFILE:
      return Code::exhausted;
    case EINVAL:
    case EISDIR:
    case ELOOP:
    case ENAMETOOLONG:
    case ENXIO:
      return Code::invalid_argument;
    default:
      return Code::unavailable;
  }
}
}  // namespace

Error errno_error(std::string_view what, int errno_value) {
  char text[128];
  return Error{code_of(errno_value), std::string(what) + ": " + strerror_r(errno_value, text, sizeof text)};
}

}  // namespace tensord::base
