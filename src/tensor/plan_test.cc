#include "tensor/plan.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <sstream>

#include "base/bytes.h"
#include "tensor/plan_testing.h"
#include "tensor/plan_transform_testing.h"
#include "tensor/view_testing.h"

namespace tensord::tensor {
namespace {

// A stanza of testdata/*.plan; stanzas are separated by empty lines, `#` begins a comment.
//
//   test    what this shows, as a sentence
//   model   NAME DTYPE [SHAPE] @OFFSET                 a tensor; row-major, or `strides A,B` in bytes
//   view    NAME[ITEMS] [swap A B].. [-> OFFSET [strides A,B]] [as DTYPE]          without `->`: packed
//   given   a record as text, taken as it is
//   do      canonical | window OFFSET SIZE | check SOURCE_BYTES TARGET_BYTES [complete]
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
      if (line.verb == "given") given_ += plan_line;
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
        wanted.to.offset = std::stoull(word);
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
    uint64_t packed_bytes = 0;
    for (const std::string& text : views_) {
      TRY_ASSIGN(View view, open_view(text));
      Strided& to = view.wanted.to;
      if (view.is_packed) {
        to.offset = packed_bytes;
        packed_bytes = base::align_up(packed_bytes + to.element_count() * to.element_bytes, 8);
      }
      wanted.push_back(view.wanted);
    }
    return compile(wanted);
  }

  Result<CopyPlan> make() {
    TRY_ASSIGN(CopyPlan plan, make_views());
    const CopyPlan given = parse_plan(given_);
    plan.records.insert(plan.records.end(), given.records.begin(), given.records.end());
    for (const std::string& step : steps_) {
      std::istringstream words(step);
      std::string verb, coverage;
      words >> verb;
      if (verb == "canonical") plan = canonical(plan);
      if (verb == "window") {
        uint64_t offset = 0, size_bytes = 0;
        words >> offset >> size_bytes;
        plan = window(plan, offset, size_bytes);
      }
      if (verb == "check") {
        uint64_t source_bytes = 0, target_bytes = 0;
        words >> source_bytes >> target_bytes >> coverage;
        TRY(check_plan(plan, source_bytes, target_bytes));
        if (coverage == "complete") TRY(check_complete(plan, target_bytes));
      }
    }
    return plan;
  }

  std::map<std::string, Model> models_;
  std::vector<std::string> views_, steps_;
  std::string given_, expected_, error_;
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

// --- random plans against bytes one by one ---------------------------------------------------------------------------

constexpr int64_t kNothing = -1;  // written by nobody

struct Painted {
  std::vector<int64_t> bytes;  // which source byte each target byte comes from
  bool overlaps = false;
  bool leaves = false;  // some byte is out of bounds
};

// Follows a plan from source to target.
Painted paint(const CopyPlan& plan, uint64_t source_size, uint64_t target_size) {
  Painted out{std::vector<int64_t>(target_size, kNothing)};
  for (const Copy2D& record : plan.records) {
    if (record.is_empty()) continue;
    for (uint64_t number = 0; number < record.outer_iterations() * record.row_count; ++number) {
      const uint64_t row = number % record.row_count;
      uint64_t left = number / record.row_count;
      auto from = static_cast<int64_t>(record.source_offset + row * static_cast<uint64_t>(record.source_pitch));
      auto to = static_cast<int64_t>(record.target_offset + row * static_cast<uint64_t>(record.target_pitch));
      for (size_t at = 0; at < record.outer_count; ++at) {
        const auto index = static_cast<int64_t>(left % record.outer[at].count);
        left /= record.outer[at].count;
        from += index * record.outer[at].source_pitch;
        to += index * record.outer[at].target_pitch;
      }
      for (uint64_t byte = 0; byte < record.row_bytes; ++byte, ++from, ++to) {
        const bool is_inside =
            to >= 0 && to < static_cast<int64_t>(target_size) && from >= 0 && from < static_cast<int64_t>(source_size);
        out.leaves |= !is_inside;
        if (!is_inside) continue;
        int64_t& painted = out.bytes[static_cast<size_t>(to)];
        out.overlaps |= painted != kNothing;
        painted = from;
      }
    }
  }
  return out;
}

class RandomPlan {
 public:
  explicit RandomPlan(uint64_t seed) : random_(seed) {}

  uint64_t below(uint64_t end) { return std::uniform_int_distribution<uint64_t>(0, end - 1)(random_); }

  // Small numbers, so that about as many plans are good as are bad.
  CopyPlan make(uint64_t source_size, uint64_t target_size) {
    CopyPlan plan;
    for (uint64_t count = 1 + below(4); count > 0; --count) {
      Copy2D record;
      record.source_offset = below(source_size);
      record.target_offset = below(target_size);
      record.row_bytes = below(12) == 0 ? 0 : 1 + below(4);
      record.row_count = 1 + below(4);
      record.source_pitch = pitch();
      record.target_pitch = pitch();
      record.outer_count = static_cast<uint8_t>(below(3));
      for (size_t at = 0; at < record.outer_count; ++at)
        record.outer[at] = {below(9) == 0 ? 0 : 1 + below(3), pitch(), pitch()};
      plan.records.push_back(record);
    }
    return plan;
  }

  // One that check_plan accepts.
  CopyPlan make_good(uint64_t source_size, uint64_t target_size) {
    for (;;) {
      CopyPlan plan = make(source_size, target_size);
      const Painted painted = paint(plan, source_size, target_size);
      if (!painted.overlaps && !painted.leaves) return plan;
    }
  }

 private:
  int64_t pitch() { return below(8) == 0 ? -static_cast<int64_t>(below(20)) : static_cast<int64_t>(below(30)); }

  std::mt19937_64 random_;
};

// Runs `trial(seed)` for many seeds, or for the one in the environment.
void for_seeds(uint64_t count, const auto& trial) {
  const char* given = std::getenv("TENSORD_SEED");
  const uint64_t seed = given ? std::strtoull(given, nullptr, 10) : std::random_device()();
  for (uint64_t round = 0; round < (given ? 1 : count); ++round) {
    SCOPED_TRACE("TENSORD_SEED=" + std::to_string(seed + round));
    trial(seed + round);
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(Plan, a_plan_is_accepted_exactly_when_no_byte_is_written_twice_or_out_of_bounds) {
  int good_count = 0;
  for_seeds(20000, [&](uint64_t seed) {
    constexpr uint64_t kSource = 150, kTarget = 150;
    const CopyPlan plan = RandomPlan(seed).make(kSource, kTarget);
    const Painted painted = paint(plan, kSource, kTarget);
    const Status status = check_plan(plan, kSource, kTarget);
    ASSERT_EQ(status.has_value(), !painted.overlaps && !painted.leaves)
        << to_text(plan) << (status ? "" : status.error().message);
    if (!status) return;
    ++good_count;
    const bool is_complete = std::count(painted.bytes.begin(), painted.bytes.end(), kNothing) == 0;
    ASSERT_EQ(check_complete(plan, kTarget).has_value(), is_complete) << to_text(plan);
    ASSERT_EQ(paint(canonical(plan), kSource, kTarget).bytes, painted.bytes) << to_text(plan);
    ASSERT_EQ(to_text(parse_plan(to_text(plan))), to_text(plan));
  });
  EXPECT_TRUE(good_count > 1000 || std::getenv("TENSORD_SEED"));
}

TEST(Plan, a_window_paints_what_the_plan_paints_there) {
  for_seeds(3000, [](uint64_t seed) {
    constexpr uint64_t kSource = 150, kTarget = 150;
    RandomPlan random(seed);
    const CopyPlan plan = random.make_good(kSource, kTarget);
    const uint64_t offset = random.below(kTarget);
    const uint64_t size_bytes = random.below(kTarget - offset + 1);
    const Painted all = paint(plan, kSource, kTarget);
    const Painted part = paint(window(plan, offset, size_bytes), kSource, size_bytes);
    const auto begin = all.bytes.begin() + static_cast<int64_t>(offset);
    ASSERT_FALSE(part.leaves);
    ASSERT_EQ(part.bytes, std::vector<int64_t>(begin, begin + static_cast<int64_t>(size_bytes)))
        << offset << " + " << size_bytes << " of\n"
        << to_text(plan);
  });
}

TEST(Plan, thousands_of_experts_are_one_record_for_each_matrix) {
  std::vector<Wanted> wanted;
  uint64_t source = 0, target = 0;
  for (int expert = 0; expert < 6144; ++expert) {
    for (const bool cuts_columns : {false, false, true}) {
      const uint64_t rows = cuts_columns ? 2048 : 768 / 2, columns = cuts_columns ? 768 / 2 : 2048;
      const int64_t pitch = cuts_columns ? 768 * 2 : 2048 * 2;
      Wanted one;
      one.label = "expert";
      one.from = {source, {rows, columns}, {pitch, 2}, 2};
      one.to = {target, {rows, columns}, {static_cast<int64_t>(columns) * 2, 2}, 2};
      source += 2048 * 768 * 2;
      target += rows * columns * 2;
      wanted.push_back(one);
    }
  }
  const auto plan = compile(wanted);
  ASSERT_TRUE(plan);
  EXPECT_EQ(plan->records.size(), 18432u);
  const Status status = check_plan(*plan, source, target);
  EXPECT_TRUE(status) << status.error().message;
  EXPECT_TRUE(check_complete(*plan, target));
}

TEST(Plan, a_dense_model_of_443_tensors_is_at_most_443_records) {
  std::vector<Wanted> wanted;
  uint64_t source = 0, target = 0;
  // The first of two tensor-parallel ranks of Qwen3-14B; tensors have gaps between them.
  const auto add = [&](uint64_t rows, uint64_t columns, uint64_t rows_kept, uint64_t columns_kept) {
    Wanted one;
    one.label = "w";
    one.from = {source, {rows_kept, columns_kept}, {static_cast<int64_t>(columns) * 2, 2}, 2};
    one.to = {target, {rows_kept, columns_kept}, {static_cast<int64_t>(columns_kept) * 2, 2}, 2};
    source += rows * columns * 2 + 64;
    target += rows_kept * columns_kept * 2;
    wanted.push_back(one);
  };
  for (int layer = 0; layer < 40; ++layer) {
    for (const uint64_t rows : {5120, 1024, 1024, 17408, 17408}) add(rows, 5120, rows / 2, 5120);  // q k v gate up
    for (const uint64_t columns : {5120, 17408}) add(5120, columns, 5120, columns / 2);            // o down
    for (const uint64_t columns : {128, 128, 5120, 5120}) add(1, columns, 1, columns);             // norms
  }
  add(151936, 5120, 151936 / 2, 5120);
  add(151936, 5120, 151936 / 2, 5120);
  add(1, 5120, 1, 5120);
  ASSERT_EQ(wanted.size(), 443u);
  const auto plan = compile(wanted);
  ASSERT_TRUE(plan);
  EXPECT_EQ(plan->records.size(), 443u);
  EXPECT_TRUE(check_plan(*plan, source, target));
  EXPECT_TRUE(check_complete(*plan, target));
}

TEST(Plan, hostile_shapes_are_refused_and_never_wrap_around) {
  const uint64_t huge = uint64_t{1} << 63;
  const int64_t low = std::numeric_limits<int64_t>::min();
  const std::pair<Strided, Strided> hostile[] = {
      {{0, {huge, 4}, {0, 0}, 1}, {0, {huge, 4}, {4, 1}, 1}},
      {{0, {huge}, {0}, 4}, {0, {huge}, {4}, 4}},
      {{~0ull, {2}, {1}, 1}, {0, {2}, {1}, 1}},
      {{0, {3}, {low}, 1}, {0, {3}, {1}, 1}},
      {{huge, {3}, {low}, 1}, {0, {3}, {1}, 1}},
      {{0, {2}, {1}, 1}, {0, {2}, {low}, 1}},
      {{0, {2, 2}, {1}, 1}, {0, {2, 2}, {2, 1}, 1}},
      {{0, std::vector<uint64_t>(65, 1), std::vector<int64_t>(65, 1), 1},
       {0, std::vector<uint64_t>(65, 1), std::vector<int64_t>(65, 1), 1}},
  };
  for (const auto& [from, to] : hostile) {
    const Wanted wanted{.label = "w", .from = from, .to = to};
    const auto plan = compile({&wanted, 1});
    ASSERT_FALSE(plan) << to_text(*plan);
    EXPECT_EQ(plan.error().code, base::Code::invalid_argument);
  }
  // 3^35 records: refused before they are more than a plan may have.
  Strided from{0, std::vector<uint64_t>(40, 3), std::vector<int64_t>(40), 1};
  for (int64_t& stride : from.strides) stride = (&stride - from.strides.data()) * 1000 + 7;
  Strided to = from;
  for (int64_t& stride : to.strides) stride = (&stride - to.strides.data()) * 1000 + 9;
  const Wanted wanted{.label = "w", .from = from, .to = to};
  const auto plan = compile({&wanted, 1});
  ASSERT_FALSE(plan);
  EXPECT_EQ(plan.error().code, base::Code::unsupported);
}

}  // namespace
}  // namespace tensord::tensor
