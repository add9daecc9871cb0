#include "tensor/selection.h"

#include <algorithm>

#include "base/text.h"

namespace tensord::tensor {

using base::Code;
using base::fail;
using base::quoted;

namespace {

// Where `pattern` goes on when its piece at `at` (no *) takes `byte`; 0 when it does not.
size_t behind_match(std::string_view pattern, size_t at, char byte) {
  if (pattern[at] == '?') return at + 1;
  const bool negated = pattern.substr(at + 1).starts_with('!');
  const size_t first = at + 1 + static_cast<size_t>(negated);
  const size_t close = pattern.find(']', first + 1);  // a ] that comes first is a letter
  if (pattern[at] != '[' || close == pattern.npos) return pattern[at] == byte ? at + 1 : 0;
  bool found = false;
  for (size_t letter = first; letter < close; ++letter) {
    const bool range = letter + 2 < close && pattern[letter + 1] == '-';
    const auto code = [](char one) { return static_cast<unsigned char>(one); };
    const auto last = code(range ? pattern[letter + 2] : pattern[letter]);
    found = found || (code(pattern[letter]) <= code(byte) && code(byte) <= last);
    if (range) letter += 2;
  }
  return found != negated ? close + 1 : 0;
}

uint64_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<uint64_t> row(b.size() + 1);
  for (size_t at = 0; at < row.size(); ++at) row[at] = at;
  for (size_t i = 1; i <= a.size(); ++i) {
    uint64_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const uint64_t changed = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, changed});
    }
  }
  return row[b.size()];
}

}  // namespace

bool matches(std::string_view pattern, std::string_view name) {
  size_t at = 0;
  size_t star = pattern.npos;  // the last one passed; it has taken the name up to `taken`
  size_t taken = 0;
  for (size_t letter = 0; letter < name.size();) {
    if (at < pattern.size() && pattern[at] == '*') {
      star = at++;
      taken = letter;
      continue;
    }
    const size_t behind = at < pattern.size() ? behind_match(pattern, at, name[letter]) : 0;
    if (behind == 0 && star == pattern.npos) return false;
    letter = behind == 0 ? ++taken : letter + 1;
    at = behind == 0 ? star + 1 : behind;
  }
  return pattern.find_first_not_of('*', at) == pattern.npos;
}

Result<std::vector<uint32_t>> select(const Index& index, std::span<const std::string> only) {
  if (only.size() > kOnlyCountMax) {
    return fail(Code::invalid_argument, "only: ", only.size(), " names; at most ", kOnlyCountMax, " are possible");
  }
  std::vector<bool> wanted(index.tensors.size());
  size_t pattern_count = 0;
  for (const std::string& words : only) {
    if (const Tensor* tensor = index.find(words)) {
      wanted[static_cast<size_t>(tensor - index.tensors.data())] = true;
      continue;
    }
    if (++pattern_count > kPatternCountMax) {
      return fail(Code::invalid_argument, "only: more than ", kPatternCountMax, " patterns, or names of no tensor as ",
                  quoted(words));
    }
    bool found = false;
    for (size_t at = 0; at < index.tensors.size(); ++at) {
      if (!matches(words, index.tensors[at].name)) continue;
      wanted[at] = found = true;
    }
    if (!found) {
      return fail(Code::not_found, "only: no tensor is or matches ", quoted(words), suggestion(index, words));
    }
  }
  std::vector<uint32_t> positions;
  for (uint32_t at = 0; at < wanted.size(); ++at) {
    if (wanted[at]) positions.push_back(at);
  }
  return positions;
}

Index take(const Index& index, std::span<const uint32_t> positions) {
  Index part{.files = index.files, .metadata = index.metadata};
  part.tensors.reserve(positions.size());
  for (const uint32_t at : positions) part.tensors.push_back(index.tensors[at]);
  return part;
}

std::string suggestion(const Index& index, std::string_view name) {
  constexpr size_t kNameMax = 200;
  constexpr size_t kTriedMax = 2000;  // a message is not worth more than a few ms
  if (name.size() > kNameMax) return "";
  uint64_t best = name.size() / 3 + 1;
  const Tensor* nearest = nullptr;
  for (size_t at = 0; at < std::min(index.tensors.size(), kTriedMax); ++at) {
    if (index.tensors[at].name.size() > kNameMax) continue;
    const uint64_t distance = edit_distance(name, index.tensors[at].name);
    if (distance < best) {
      best = distance;
      nearest = &index.tensors[at];
    }
  }
  return nearest == nullptr ? "" : "; did you mean " + quoted(nearest->name) + "?";
}

std::vector<uint32_t> batch_numbers(const Index& index, uint64_t batch_bytes) {
  std::vector<uint32_t> numbers(index.tensors.size());
  uint32_t number = 0;
  uint64_t used_bytes = 0;
  size_t used_count = 0;
  for (const uint32_t at : in_file_order(index.tensors)) {
    const uint64_t tensor_bytes = index.tensors[at].size_bytes;
    if (used_count == kBatchTensorsMax || (used_bytes > 0 && used_bytes + tensor_bytes > batch_bytes)) {
      ++number;
      used_bytes = used_count = 0;
    }
    numbers[at] = number;
    used_bytes += tensor_bytes;
    ++used_count;
  }
  return numbers;
}

}  // namespace tensord::tensor
