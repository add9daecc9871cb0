// JSON from outside as a stream of events: its library stays in one .cc, no document tree is built.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/result.h"

namespace tensord::tensor {

// Objects and arrays deeper than this are refused.
inline constexpr uint32_t kJsonDepthMax = 32;

// What a reader of some format overrides. An event that fails ends the walk with its error.
class JsonEvents {
 public:
  virtual ~JsonEvents() = default;
  virtual base::Status object_begin() = 0;
  virtual base::Status key(std::string name) = 0;  // of the value that follows; may be a duplicate
  virtual base::Status object_end() = 0;
  virtual base::Status array_begin() = 0;
  virtual base::Status array_end() = 0;
  virtual base::Status string(std::string value) = 0;
  virtual base::Status natural(uint64_t value) = 0;  // 0 .. 2^64 - 1, written without sign, point or exponent
  virtual base::Status null() = 0;
  virtual base::Status other(
      std::string_view what) = 0;  // "a negative number", "a fraction", "true", "false"
};

// One JSON value (RFC 8259), white space around it allowed. Code::corrupt, beginning with `where`: not JSON
// or not UTF-8 (with the byte where it stops being so), nested deeper than kJsonDepthMax.
base::Status walk_json(std::string_view json, const std::string& where, JsonEvents& events);

}  // namespace tensord::tensor
