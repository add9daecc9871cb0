// Plans as text and out of it, for tests. `tensord show` writes its plans in the same way (python/tensord/cli/show.py).
#pragma once

#include <gtest/gtest.h>

#include <sstream>
#include <string>

#include "tensor/plan.h"

namespace tensord::tensor {

// One line a record:
//   1006 pitch 12 -> 0 pitch 6   8 rows x 6 B
//   1006 pitch 12 -> 0 pitch 6   8 rows x 6 B   x 4 pitch 96 -> 48
//   0 -> 0   1 row x 64 B   F32 as BF16
std::string to_text(const CopyPlan& plan);

// Reads one record from a stream of words; fails the test where a word is not what it should be.
class RecordText {
 public:
  explicit RecordText(const std::string& line) : words_(line), line_(line) { next(); }

  Copy2D read() {
    Copy2D record;
    record.source_offset = number<uint64_t>();
    read_pitch(record.source_pitch);
    expect("->");
    record.target_offset = number<uint64_t>();
    read_pitch(record.target_pitch);
    record.row_count = number<uint64_t>();
    next();  // row, rows
    expect("x");
    record.row_bytes = number<uint64_t>();
    expect("B");
    while (accept("x")) {
      Repeat loop;
      loop.count = number<uint64_t>();
      expect("pitch");
      loop.source_pitch = number<int64_t>();
      expect("->");
      loop.target_pitch = number<int64_t>();
      record.outer.at(record.outer_count++) = loop;
    }
    if (!word_.empty()) {
      record.source_dtype = parse_dtype(take());
      expect("as");
      record.target_dtype = parse_dtype(take());
    }
    EXPECT_EQ(word_, "") << line_;
    return record;
  }

 private:
  void next() {
    word_.clear();
    words_ >> word_;
  }
  std::string take() {
    std::string taken = word_;
    next();
    return taken;
  }
  bool accept(const std::string& word) {
    if (word_ != word) return false;
    next();
    return true;
  }
  void expect(const std::string& word) { EXPECT_TRUE(accept(word)) << line_ << ": '" << word_ << "'"; }
  template <typename Number>
  Number number() {
    Number value = 0;
    std::istringstream(take()) >> value;
    return value;
  }
  void read_pitch(int64_t& pitch) {
    if (accept("pitch")) pitch = number<int64_t>();
  }

  std::istringstream words_;
  const std::string line_;
  std::string word_;
};

// The inverse of to_text.
inline CopyPlan parse_plan(const std::string& text) {
  CopyPlan plan;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.find_first_not_of(' ') != std::string::npos) plan.records.push_back(RecordText(line).read());
  }
  return plan;
}

}  // namespace tensord::tensor
