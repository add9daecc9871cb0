// text(parts...): messages out of strings and numbers, without streams.
#pragma once

#include <concepts>
#include <string>
#include <string_view>

namespace tensord::base {

inline void append_text(std::string& out, std::string_view part) { out += part; }
template <std::integral T>
requires(!std::same_as<T, char> && !std::same_as<T, bool>) void append_text(std::string& out, T part) {
  out += std::to_string(part);
}
// Three significant decimals, for seconds and rates.
void append_text(std::string& out, double part);

// text("read ", path, " at ", 4096) -> "read model.safetensors at 4096"
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::string out;
  (append_text(out, parts), ...);
  return out;
}

// 'name' with control characters and quotes escaped, cut to 200 characters: for names that come from outside.
std::string quoted(std::string_view name);

}  // namespace tensord::base
