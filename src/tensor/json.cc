#include "tensor/json.h"

#include <nlohmann/json.hpp>

namespace tensord::tensor {

using base::Code;
using base::fail;
using base::Status;
using Kind = JsonValue::Kind;

namespace {

// The library's interface on one side, JsonEvents on the other. Every function says whether to go on.
class Adapter {
 public:
  Adapter(const std::string& where, JsonEvents& events) : where_(where), events_(events) {}

  bool null() { return give({Kind::null, "null"}); }
  bool boolean(bool value) { return give({Kind::other, value ? "true" : "false"}); }
  bool number_integer(int64_t) { return give({Kind::other, "a negative number"}); }
  bool number_unsigned(uint64_t value) { return give({Kind::natural, "a number", {}, value}); }
  bool number_float(double, const std::string& digits) {
    const bool whole = digits.find_first_of(".eE") == std::string::npos;
    return give({Kind::other, whole ? "a number beyond 64 bits" : "a fraction"});
  }
  bool string(std::string& value) { return give({Kind::string, "a string", std::move(value)}); }
  bool binary(nlohmann::json::binary_t&) { return false; }  // CBOR and its like only
  bool start_object(size_t) { return enter({Kind::object, "an object"}); }
  bool key(std::string& name) { return path_.back() = std::move(name), true; }
  bool end_object() { return path_.pop_back(), keep(events_.end(path_)); }
  bool start_array(size_t) { return enter({Kind::array, "an array"}); }
  bool end_array() { return end_object(); }
  bool parse_error(size_t byte, const std::string&, const nlohmann::json::exception& error) {
    // The library's own text quotes the input without bounds, so only its kind is used.
    const bool encoding = std::string_view(error.what()).find("ill-formed UTF-8") != std::string_view::npos;
    return keep(fail(Code::corrupt, where_, encoding ? " is not UTF-8" : " is not valid JSON", " at byte ", byte));
  }

  Status status() && { return std::move(status_); }

 private:
  bool keep(Status status) {
    if (status) return true;
    status_ = std::move(status);
    return false;
  }
  bool give(JsonValue&& value) { return keep(events_.value(path_, std::move(value))); }
  bool enter(JsonValue&& value) {
    if (path_.size() == kJsonDepthMax) {
      return keep(fail(Code::corrupt, where_, " nests deeper than ", kJsonDepthMax, " levels"));
    }
    if (!give(std::move(value))) return false;
    path_.emplace_back();
    return true;
  }

  const std::string& where_;
  JsonEvents& events_;
  std::vector<std::string> path_;
  Status status_;
};

}  // namespace

Status walk_json(std::string_view json, const std::string& where, JsonEvents& events) {
  // The library takes a NUL for the end of its input.
  if (const size_t nul = json.find('\0'); nul != std::string_view::npos) {
    return fail(Code::corrupt, where, " is not valid JSON at byte ", nul + 1);
  }
  Adapter adapter(where, events);
  try {
    nlohmann::json::sax_parse(json.begin(), json.end(), &adapter);
  } catch (const std::exception& error) {
    return fail(Code::exhausted, where, " could not be read: ", error.what());
  }
  return std::move(adapter).status();
}

}  // namespace tensord::tensor
