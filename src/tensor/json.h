// JSON from outside as a stream of events: its library stays in one .cc, no document tree is built.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "base/result.h"

namespace tensord::tensor {

// Objects and arrays deeper than this are refused.
inline constexpr uint32_t kJsonDepthMax = 32;

// A value as it begins: scalars whole, objects and arrays before what they hold.
struct JsonValue {
  enum class Kind : uint8_t { object, array, string, natural, null, other };
  Kind kind = Kind::other;
  std::string_view what;  // "an object", "a string", "a number", .. "a negative number", "a fraction", "true", "false"
  std::string text = {};  // of a string
  uint64_t number = 0;    // of a natural number: 0 .. 2^64 - 1, written without sign, point or exponent
};

// What a reader of some format overrides. An event that fails ends the walk with its error. `path`: the keys around the
// value, of which any may be there twice; "" for an array.
class JsonEvents {
 public:
  virtual ~JsonEvents() = default;
  virtual base::Status value(std::span<const std::string> path, JsonValue&& value) = 0;
  virtual base::Status end(std::span<const std::string> path) = 0;  // of an object or array
};

// One JSON value (RFC 8259), white space around it allowed. Code::corrupt, beginning with `where`: not JSON
// or not UTF-8 (with the byte where it stops being so), nested deeper than kJsonDepthMax.
base::Status walk_json(std::string_view json, const std::string& where, JsonEvents& events);

}  // namespace tensord::tensor
