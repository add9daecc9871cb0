#include "base/text.h"

#include <cstdio>

#include "base/bytes.h"

namespace tensord::base {

void append_text(std::string& out, double part) {
  char digits[40];
  std::snprintf(digits, sizeof digits, "%.3g", part);
  out += digits;
}

std::string quoted(std::string_view name) {
  constexpr size_t kShownMax = 200;
  std::string out = "'";
  for (const char c : name.substr(0, kShownMax)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) {
      out += "\\x" + to_hex(&byte, 1);
    } else {
      if (c == '\'' || c == '\\') out += '\\';
      out += c;
    }
  }
  if (name.size() > kShownMax) out += "...";
  return out + "'";
}

}  // namespace tensord::base
