// Text for people: aligned tables, bars, and numbers with their units. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tensord::cli {

enum class Align { left, right };

struct Column {
  std::string_view title;
  Align align = Align::left;
};

// Two blanks between columns, none behind the last word of a line.
class Table {
 public:
  explicit Table(std::vector<Column> columns);
  void add(std::vector<std::string> row);  // as many cells as columns (CHECK)
  std::string text() const;

 private:
  const std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;  // the titles are the first
};

// share 0 to 1 (clipped) -> "######....", `width` characters.
std::string bar(double share, int width);

// 1500000 -> "1.50 ms", 62000000000 -> "1 min 2 s".
std::string human_ns(int64_t ns);

// Fixed decimals: decimals(3.14159, 2) -> "3.14".
std::string decimals(double value, int digits);

// How many characters a UTF-8 text shows, near enough for names of files and tensors.
size_t shown_width(std::string_view text);

}  // namespace tensord::cli
