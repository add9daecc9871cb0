// Failures of the world: Result<T> holds a value or an Error. Absence is std::optional; our bugs are CHECKs.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <tl/expected.hpp>
#include <utility>

#include "base/text.h"

namespace tensord::base {

// The numbers are part of the protocol and of the C ABI (include/tensord/tensord.h): never renumber.
enum class Code : uint8_t {
  not_found = 1,         // no such file, tensor, artifact
  invalid_argument = 2,  // the caller asked for something that makes no sense
  exhausted = 3,         // a limit is reached; the message names what holds the resource
  unavailable = 4,       // the daemon or a device does not answer; trying again may help
  cancelled = 5,         // the caller gave up
  corrupt = 6,           // bytes are not what their format or digest says
  changed = 7,           // a file is not what it was when it was opened
  denied = 8,            // permissions, or somebody else holds it
  unsupported = 9,       // understood, but not done here
  internal = 10,         // a bug of ours that was caught in time
};

std::string_view code_name(Code code);
// The code of a number from outside; Code::internal for one that is none.
Code code_from(uint32_t number);

// Whether a failed copy left the caller's memory as it was.
enum class TargetState : uint8_t { untouched = 0, dirty = 1 };

struct Error {
  Code code = Code::internal;
  std::string message;  // what was tried, on what, why it failed, what to do
  TargetState target = TargetState::untouched;
};

template <typename T>
using Result = tl::expected<T, Error>;
using Status = Result<void>;

// fail(Code::corrupt, path, ": ", count, " bytes"): the parts are joined as text() does.
template <typename... Parts>
tl::unexpected<Error> fail(Code code, const Parts&... parts) {
  return tl::unexpected<Error>(Error{code, text(parts...)});
}

// The error of a failed result, to return it as any other Result: `return pass_on(status)`.
template <typename T>
tl::unexpected<Error> pass_on(T&& failed) {
  return tl::unexpected<Error>(std::forward<T>(failed).error());
}

// "what: <errno text>", with the code that fits errno (ENOENT not_found, EACCES denied, ENOMEM/ENOSPC/EMFILE
// exhausted, ENAMETOOLONG/ELOOP/EISDIR invalid_argument, others unavailable).
Error errno_error(std::string_view what, int errno_value);

// fail_errno(errno, "open ", path)
template <typename... Parts>
tl::unexpected<Error> fail_errno(int errno_value, const Parts&... parts) {
  return tl::unexpected<Error>(errno_error(text(parts...), errno_value));
}

}  // namespace tensord::base

#define TENSORD_JOIN_(a, b) a##b
#define TENSORD_JOIN(a, b) TENSORD_JOIN_(a, b)

// TRY(status_expression): returns its error from the calling function.
#define TRY(expression)                                                                           \
  do {                                                                                            \
    if (auto try_status = (expression); !try_status) return ::tensord::base::pass_on(try_status); \
  } while (false)

// TRY_ASSIGN(auto value, result_expression): as TRY, else moves the value out.
#define TRY_ASSIGN(declaration, expression) TRY_ASSIGN_(TENSORD_JOIN(try_result_, __LINE__), declaration, expression)
#define TRY_ASSIGN_(name, declaration, expression)  \
  auto name = (expression);                         \
  if (!name) return ::tensord::base::pass_on(name); \
  declaration = std::move(*name)
