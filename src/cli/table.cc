#include "cli/table.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "base/check.h"
#include "base/text.h"

namespace tensord::cli {

Table::Table(std::vector<Column> columns) : columns_(std::move(columns)) {
  std::vector<std::string> titles;
  for (const Column& column : columns_) titles.emplace_back(column.title);
  rows_.push_back(std::move(titles));
}

void Table::add(std::vector<std::string> row) {
  CHECK(row.size() == columns_.size());
  rows_.push_back(std::move(row));
}

std::string Table::text() const {
  std::vector<size_t> widths(columns_.size(), 0);
  for (const auto& row : rows_) {
    for (size_t at = 0; at < row.size(); ++at) widths[at] = std::max(widths[at], shown_width(row[at]));
  }
  std::string out;
  for (const auto& row : rows_) {
    std::string line;
    for (size_t at = 0; at < row.size(); ++at) {
      const std::string blanks(widths[at] - shown_width(row[at]), ' ');
      if (at > 0) line += "  ";
      line += columns_[at].align == Align::right ? blanks + row[at] : row[at] + blanks;
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  }
  return out;
}

std::string bar(double share, int width) {
  const double clipped = std::isfinite(share) ? std::clamp(share, 0.0, 1.0) : 0.0;
  const auto full = static_cast<size_t>(std::lround(clipped * width));
  return std::string(full, '#') + std::string(static_cast<size_t>(width) - full, '.');
}

std::string human_ns(int64_t ns) {
  const auto value = static_cast<double>(ns);
  if (ns < 1'000) return base::text(ns, " ns");
  if (ns < 1'000'000) return decimals(value / 1e3, 1) + " us";
  if (ns < 1'000'000'000) return decimals(value / 1e6, 2) + " ms";
  if (ns < 60'000'000'000) return decimals(value / 1e9, 2) + " s";
  const int64_t seconds = ns / 1'000'000'000;
  if (seconds < 3600) return base::text(seconds / 60, " min ", seconds % 60, " s");
  return base::text(seconds / 3600, " h ", seconds / 60 % 60, " min");
}

std::string decimals(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

size_t shown_width(std::string_view text) {
  return static_cast<size_t>(std::count_if(
      text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
}

}  // namespace tensord::cli
