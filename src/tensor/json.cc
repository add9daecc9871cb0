#include "tensor/json.h"

#include <nlohmann/json.hpp>

namespace tensord::tensor {

using base::Code;
using base::fail;
using base::Status;

namespace {

// The library's interface on one side, JsonEvents on the other. Every function says whether to go on.
class Adapter {
 public:
  Adapter(const std::string& where, JsonEvents& events) : where_(where), events_(events) {}

  bool null() { return keep(events_.null()); }
  bool boolean(bool value) { return keep(events_.other(value ? "true" : "false")); }
  bool number_integer(int64_t) { return keep(events_.other("a negative number")); }
  bool number_unsigned(uint64_t value) { return keep(events_.natural(value)); }
  bool number_float(double, const std::string& digits) {
    const bool whole = digits.find_first_of(".eE") == std::string::npos;
    return keep(events_.other(whole ? "a number beyond 64 bits" : "a fraction"));
  }
  bool string(std::string& value) { return keep(events_.string(std::move(value))); }
  bool binary(nlohmann::json::binary_t&) { return false; }  // CBOR and its like only
  bool start_object(size_t) { return deeper() && keep(events_.object_begin()); }
  bool key(std::string& name) { return keep(events_.key(std::move(name))); }
  bool end_object() { return --depth_, keep(events_.object_end()); }
  bool start_array(size_t) { return deeper() && keep(events_.array_begin()); }
  bool end_array() { return --depth_, keep(events_.array_end()); }
  bool parse_error(size_t byte, const std::string&, const nlohmann::json::exception& error) {
    // The library's own text quotes the input without bounds, so only its kind is used.
    const bool encoding = std::string_view(error.what()).find("ill-formed UTF-8") != std::string_view::npos;
    return keep(
        fail(Code::corrupt, where_, encoding ? " is not UTF-8" : " is not valid JSON", " at byte ", byte));
  }

  Status status() && { return std::move(status_); }

 private:
  bool keep(Status status) {
    if (status) return true;
    status_ = std::move(status);
    return false;
  }
  bool deeper() {
    if (++depth_ <= kJsonDepthMax) return true;
    return keep(fail(Code::corrupt, where_, " nests deeper than ", kJsonDepthMax, " levels"));
  }

  const std::string& where_;
  JsonEvents& events_;
  uint32_t depth_ = 0;
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
