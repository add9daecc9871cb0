#include "tensor/plan.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

#include "tensor/plan_testing.h"

namespace tensord::tensor {
namespace {

// A stanza of testdata/*.plan; stanzas are separated by empty lines, `#` begins a comment.
//
//   test    what this shows, as a sentence
//   model   [sN:]NAME DTYPE [SHAPE] @OFFSET                 a tensor; row-major, or `strides A,B` in bytes
//   view    NAME[ITEMS] [swap A B].. [-> [tN:]OFFSET [strides A,B]] [as DTYPE]     without `->`: packed into target 0
//   pad     zero what packing leaves free
//   given   a record as text, taken as it is; `inner` likewise, for compose
//   do      canonical | window OFFSET SIZE | compose | check SOURCE,SIZES TARGET,SIZES [complete]
//   plan    the expected records, one a line; `error` a part of the expected message; `ok` no error is all
struct Stanza {
  struct Line {
    std::string verb, rest;
    int number;
  };
  std::vector<Line> lines;
  std::string text() const {
    std::string out;
    for (const Line& line : lines) out += line.verb + "  " + line.rest + "\n";
    return out;
  }
};

std::vector<Stanza> read_stanzas(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::vector<Stanza> stanzas(1);
  int number = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    line = line.substr(0, line.find('#'));
    std::istringstream words(line);
    std::string verb, rest;
    if (!(words >> verb)) {
      if (!stanzas.back().lines.empty()) stanzas.emplace_back();
      continue;
    }
    std::getline(words >> std::ws, rest);
    stanzas.back().lines.push_back({verb, rest, number});
  }
  if (stanzas.back().lines.empty()) stanzas.pop_back();
  return stanzas;
}

template <typename Number>
std::vector<Number> numbers(std::string list) {
  std::erase_if(list, [](char c) { return c == '[' || c == ']'; });
  std::vector<Number> out;
  std::istringstream parts(list);
  for (std::string part; std::getline(parts, part, ',');) {
    out.push_back(std::is_signed_v<Number> ? static_cast<Number>(std::stoll(part))
                                           : static_cast<Number>(std::stoull(part)));
  }
  return out;
}

class Play {
 public:
  void run(const Stanza& stanza) {
    for (const Stanza::Line& line : stanza.lines) {
      const std::string plan_line = line.rest + "\n";
      if (line.verb == "model") add_model(line.rest);
      if (line.verb == "view") add_view(line.rest);
      if (line.verb == "pad") pads_ = true;
      if (line.verb == "given") given_ += plan_line;
      if (line.verb == "inner") inner_ += plan_line;
      if (line.verb == "plan") expected_ += plan_line;
      if (line.verb == "error") error_ = line.rest;
      if (line.verb == "do") steps_.push_back(line.rest);
    }
    const Result<CopyPlan> plan = make();
    if (!error_.empty()) {
      ASSERT_FALSE(plan) << to_text(*plan);
      EXPECT_NE(plan.error().message.find(error_), std::string::npos) << plan.error().message;
      return;
    }
    ASSERT_TRUE(plan) << plan.error().message;
    if (expected_.empty()) return;
    EXPECT_EQ(to_text(*plan), to_text(parse_plan(expected_)));
    EXPECT_EQ(canonical(canonical(*plan)), canonical(*plan));
  }

 private:
  struct Model {
    Tensor tensor;
    uint32_t source = 0;
    std::optional<std::vector<int64_t>> strides;
  };
  struct View {
    Wanted wanted;
    bool is_packed = true;
  };

  void add_model(const std::string& text) {
    std::istringstream words(text);
    Model model;
    std::string name, dtype, shape, word;
    words >> name >> dtype >> shape;
    if (const size_t colon = name.find(':'); colon != std::string::npos) {
      model.source = static_cast<uint32_t>(std::stoul(name.substr(1)));
      name = name.substr(colon + 1);
    }
    model.tensor.name = name;
    model.tensor.dtype_text = dtype;
    model.tensor.dtype = parse_dtype(dtype);
    model.tensor.shape = numbers<uint64_t>(shape);
    uint64_t bits = std::max(dtype_bits(model.tensor.dtype), 1u);
    for (const uint64_t extent : model.tensor.shape) bits *= extent;
    model.tensor.size_bytes = bits / 8;
    while (words >> word) {
      if (word[0] == '@') model.tensor.offset = std::stoull(word.substr(1));
      if (word == "strides" && words >> word) model.strides = numbers<int64_t>(word);
    }
    models_[name] = model;
  }

  void add_view(const std::string& text) { views_.push_back(text); }

  Result<View> open_view(const std::string& text) {
    View view;
    const bool has_items = text.find('[') < text.find(' ');
    const size_t end = has_items ? text.find(']') + 1 : text.find(' ');
    TRY_ASSIGN(const ViewItem item, parse_view_item(std::string_view(text).substr(0, end)));
    EXPECT_EQ(parse_view_item(to_text(item)).value(), item);
    const auto found = models_.find(item.name);
    if (found == models_.end()) return base::fail(base::Code::not_found, "no such tensor");
    const Model& model = found->second;
    Wanted& wanted = view.wanted;
    wanted.label = model.tensor.name;
    wanted.source = model.source;
    wanted.source_dtype = wanted.target_dtype = model.tensor.dtype;
    TRY_ASSIGN(wanted.from, resolve(model.tensor, item.items, model.tensor.offset));
    if (model.strides) wanted.from.strides = *model.strides;
    std::istringstream words(end == std::string::npos ? "" : text.substr(end));
    std::string word;
    std::vector<int64_t> strides;
    while (words >> word) {
      if (word == "swap") {
        size_t a = 0, b = 0;
        words >> a >> b;
        std::swap(wanted.from.shape.at(a), wanted.from.shape.at(b));
        std::swap(wanted.from.strides.at(a), wanted.from.strides.at(b));
      } else if (word == "as") {
        words >> word;
        wanted.target_dtype = parse_dtype(word);
      } else if (word == "->") {
        words >> word;
        view.is_packed = false;
        const size_t colon = word.find(':');
        if (colon != std::string::npos) wanted.target = static_cast<uint32_t>(std::stoul(word.substr(1)));
        wanted.to.offset = std::stoull(colon == std::string::npos ? word : word.substr(colon + 1));
      } else if (word == "strides") {
        words >> word;
        strides = numbers<int64_t>(word);
      } else if (word == "shape") {
        words >> word;
        wanted.to.shape = numbers<uint64_t>(word);
      }
    }
    Tensor packed;
    packed.dtype = dtype_bytes(wanted.target_dtype) ? wanted.target_dtype : Dtype::u8;
    packed.shape = wanted.from.shape;
    const Strided to = whole(packed, wanted.to.offset);
    if (wanted.to.shape.empty()) wanted.to.shape = wanted.from.shape;
    wanted.to.strides = strides.empty() ? to.strides : strides;
    wanted.to.element_bytes = to.element_bytes;
    return view;
  }

  Result<CopyPlan> make_views() {
    std::vector<Wanted> wanted;
    std::vector<Strided> regions;
    std::vector<size_t> packed;
    for (const std::string& text : views_) {
      TRY_ASSIGN(View view, open_view(text));
      if (view.is_packed) {
        packed.push_back(wanted.size());
        regions.push_back(view.wanted.to);
      }
      wanted.push_back(view.wanted);
    }
    TRY_ASSIGN(const PackedLayout layout, pack(regions));
    for (size_t at = 0; at < packed.size(); ++at) wanted[packed[at]].to.offset = layout.items[at].offset;
    TRY_ASSIGN(CopyPlan plan, compile(wanted));
    if (pads_) {
      const CopyPlan padding = pack_padding(layout, 0);
      plan.records.insert(plan.records.end(), padding.records.begin(), padding.records.end());
    }
    return plan;
  }

  Result<CopyPlan> make() {
    TRY_ASSIGN(CopyPlan plan, make_views());
    const CopyPlan given = parse_plan(given_);
    plan.records.insert(plan.records.end(), given.records.begin(), given.records.end());
    for (const std::string& step : steps_) {
      std::istringstream words(step);
      std::string verb, sources, targets, coverage;
      words >> verb;
      if (verb == "canonical") plan = canonical(plan);
      if (verb == "compose") {
        TRY_ASSIGN(plan, compose(plan, parse_plan(inner_)));
      }
      if (verb == "window") {
        uint64_t offset = 0, size_bytes = 0;
        words >> offset >> size_bytes;
        plan = window(plan, 0, offset, size_bytes);
      }
      if (verb == "check") {
        words >> sources >> targets >> coverage;
        TRY(check_plan(plan, numbers<uint64_t>(sources), numbers<uint64_t>(targets),
                       coverage == "complete" ? Coverage::complete : Coverage::any));
      }
    }
    return plan;
  }

  std::map<std::string, Model> models_;
  std::vector<std::string> views_, steps_;
  std::string given_, inner_, expected_, error_;
  bool pads_ = false;
};

TEST(Plan, every_stanza_of_the_test_data_holds) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(TENSORD_TESTDATA)) {
    if (entry.path().extension() != ".plan") continue;
    for (const Stanza& stanza : read_stanzas(entry.path())) {
      SCOPED_TRACE(entry.path().filename().string() + ":" + std::to_string(stanza.lines[0].number) + "\n" +
                   stanza.text());
      Play().run(stanza);
      ++count;
    }
  }
  EXPECT_GT(count, 60);
}

}  // namespace
}  // namespace tensord::tensor
