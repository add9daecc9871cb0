#include "base/bytes.h"

#include <cctype>
#include <charconv>
#include <cstdio>

namespace tensord::base {

std::string human_bytes(uint64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.2f %s", value, kUnits[unit]);
  return text;
}

Result<uint64_t> parse_bytes(std::string_view text) {
  const auto refuse = [&] {
    return fail(Code::invalid_argument, "size '", text,
                "': write a number with an optional unit, such as 8GiB or 512MiB");
  };
  double value = 0;
  const auto [rest, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (problem != std::errc() || !(value >= 0)) return refuse();
  std::string unit;
  for (const char* at = rest; at != text.data() + text.size(); ++at) {
    if (*at != ' ') unit += static_cast<char>(std::tolower(static_cast<unsigned char>(*at)));
  }
  int power = 0;
  if (!unit.empty() && unit != "b") {
    const size_t at = std::string_view("kmgtpe").find(unit[0]);
    if (at == std::string_view::npos) return refuse();
    const std::string_view tail = std::string_view(unit).substr(1);
    if (!tail.empty() && tail != "b" && tail != "ib") return refuse();
    power = static_cast<int>(at) + 1;
  }
  for (int step = 0; step < power; ++step) value *= 1024;
  if (value >= 18446744073709551616.0) return refuse();
  return static_cast<uint64_t>(value);
}

std::string to_hex(const void* data, size_t size_bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  const auto* bytes = static_cast<const unsigned char*>(data);
  std::string text;
  text.reserve(size_bytes * 2);
  for (size_t at = 0; at < size_bytes; ++at) {
    text += kDigits[bytes[at] >> 4];
    text += kDigits[bytes[at] & 15];
  }
  return text;
}

}  // namespace tensord::base
