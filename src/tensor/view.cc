#include "tensor/view.h"

#include <algorithm>
#include <charconv>
#include <limits>

#include "base/bytes.h"
#include "base/text.h"

namespace tensord::tensor {

using base::Code;
using base::fail;
using base::quoted;

namespace {

using Wide = __int128;  // holds any product of an extent and a stride

struct Range {
  Wide start = 0;
  int64_t step = 1;
  uint64_t length = 0;
};

// The rules of Python's slice.indices().
Range clip(const IndexItem& item, uint64_t extent) {
  const Wide n = extent;
  const int64_t step = item.step.value_or(1);
  const auto bound = [&](std::optional<int64_t> given, Wide otherwise) {
    if (!given) return otherwise;
    Wide value = *given;
    if (value < 0) value += n;
    if (value < 0) return step < 0 ? Wide(-1) : Wide(0);
    if (value >= n) return step < 0 ? n - 1 : n;
    return value;
  };
  const Wide start = bound(item.start, step < 0 ? n - 1 : Wide(0));
  const Wide stop = bound(item.stop, step < 0 ? Wide(-1) : n);
  if (step > 0 ? stop <= start : stop >= start) return {};
  const Wide length = step > 0 ? (stop - start - 1) / step + 1 : (start - stop - 1) / -Wide(step) + 1;
  return {start, step, static_cast<uint64_t>(length)};
}

// What items pick, in units of bytes, or of bits for sub-byte types.
struct Picked {
  Wide offset = 0;
  std::vector<uint64_t> shape;
  std::vector<int64_t> strides;
  bool is_whole = true;  // every dimension is taken as it is
  bool has_unit_steps = true;

  void add(uint64_t extent, int64_t stride) {
    shape.push_back(extent);
    strides.push_back(stride);
  }
};

tl::unexpected<base::Error> refuse(const Tensor& tensor, const auto&... why) {
  return fail(Code::invalid_argument, "slice tensor ", quoted(tensor.name), ": ", why...);
}

Result<Picked> pick(const Tensor& tensor, const IndexItems& items, uint32_t unit) {
  using Kind = IndexItem::Kind;
  const auto count = [&](Kind kind) {
    return static_cast<size_t>(
        std::count_if(items.begin(), items.end(), [&](const IndexItem& item) { return item.kind == kind; }));
  };
  const size_t rank = tensor.shape.size();
  const size_t taken = count(Kind::slice) + count(Kind::integer);
  if (count(Kind::ellipsis) > 1) return refuse(tensor, "an index may hold one '...' only");
  if (taken > rank) return refuse(tensor, "too many indices: ", taken, " for ", rank, " dimensions");

  const std::vector<int64_t> strides = row_major_strides(tensor.shape, unit);
  Picked picked;
  size_t dimension = 0;
  const auto take_whole = [&](size_t more) {
    for (; more > 0; --more, ++dimension) picked.add(tensor.shape[dimension], strides[dimension]);
  };
  for (const IndexItem& item : items) {
    if (item.kind == Kind::ellipsis) {
      take_whole(rank - taken);
      continue;
    }
    if (item.kind == Kind::new_axis) {
      picked.add(1, 0);
      continue;
    }
    const uint64_t extent = tensor.shape[dimension];
    const int64_t stride = strides[dimension];
    if (item.kind == Kind::integer) {
      const Wide at = item.integer < 0 ? Wide(item.integer) + extent : Wide(item.integer);
      if (at < 0 || at >= Wide(extent)) {
        return refuse(tensor, "dimension ", dimension, ": index ", item.integer, " is out of range for extent ",
                      extent);
      }
      picked.offset += at * stride;
      picked.is_whole = false;
    } else {
      if (item.step == 0) return refuse(tensor, "dimension ", dimension, ": the step of a slice must not be 0");
      const Range range = clip(item, extent);
      const bool is_unit = range.length < 2 || range.step == 1;
      int64_t step_stride;
      if (is_unit || __builtin_mul_overflow(range.step, stride, &step_stride)) step_stride = stride;
      picked.offset += range.start * stride;
      picked.add(range.length, step_stride);
      picked.has_unit_steps &= is_unit;
      picked.is_whole &= range.length == extent && is_unit;
    }
    ++dimension;
  }
  take_whole(rank - dimension);
  if (picked.shape.size() > kRankMax) return refuse(tensor, "more than ", kRankMax, " dimensions");
  return picked;
}

// A region of bytes out of one of elements that are `bits` wide; nullopt where rows begin or end within a byte.
std::optional<Strided> in_bytes(Picked picked, uint32_t bits, uint64_t offset) {
  std::vector<uint64_t>& shape = picked.shape;
  std::vector<int64_t>& strides = picked.strides;
  while (shape.size() > 1 && shape.back() == 1) {
    shape.pop_back();
    strides.pop_back();
  }
  if (shape.empty() || strides.back() != bits) return std::nullopt;
  // Rows of 3 F4 elements do not end on a byte, two of them together do.
  while (shape.size() > 1 && shape.back() * bits % 8 != 0 &&
         Wide(strides[shape.size() - 2]) == Wide(shape.back()) * bits) {
    shape[shape.size() - 2] *= shape.back();
    shape.pop_back();
    strides.pop_back();
    strides.back() = bits;
  }
  if (picked.offset % 8 != 0 || shape.back() * bits % 8 != 0) return std::nullopt;
  for (size_t dimension = 0; dimension + 1 < shape.size(); ++dimension) {
    if (shape[dimension] > 1 && strides[dimension] % 8 != 0) return std::nullopt;
    strides[dimension] /= 8;
  }
  shape.back() = shape.back() * bits / 8;
  strides.back() = 1;
  return Strided{offset + static_cast<uint64_t>(picked.offset / 8), std::move(shape), std::move(strides), 1};
}

}  // namespace

uint64_t Strided::element_count() const {
  if (std::ranges::find(shape, 0u) != shape.end()) return 0;
  return tensor::element_count(shape).value_or(std::numeric_limits<uint64_t>::max());
}

std::vector<int64_t> row_major_strides(const std::vector<uint64_t>& shape, uint32_t unit) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = unit;
  for (size_t dimension = shape.size(); dimension-- > 0;) {
    strides[dimension] = stride;
    if (__builtin_mul_overflow(stride, std::max<uint64_t>(shape[dimension], 1), &stride)) stride = 0;
  }
  return strides;
}

Strided whole(const Tensor& tensor, uint64_t offset) {
  const std::optional<uint32_t> element_bytes = dtype_bytes(tensor.dtype);
  if (!element_bytes) return {offset, {tensor.size_bytes}, {1}, 1};
  return {offset, tensor.shape, row_major_strides(tensor.shape, *element_bytes), *element_bytes};
}

Result<Strided> resolve(const Tensor& tensor, const IndexItems& items, uint64_t offset) {
  // Bit offsets of sub-byte types must fit as well: no tensor is larger than an exbibyte.
  constexpr uint64_t kSizeMax = uint64_t{1} << 60;
  if (tensor.size_bytes > kSizeMax || !base::checked_add(offset, tensor.size_bytes)) {
    return refuse(tensor, tensor.size_bytes, " bytes at ", offset, " do not fit an address space");
  }
  const std::optional<uint32_t> element_bytes = dtype_bytes(tensor.dtype);
  const uint32_t bits = dtype_bits(tensor.dtype);
  const uint32_t unit = element_bytes ? *element_bytes : std::max(bits, 1u);
  TRY_ASSIGN(Picked picked, pick(tensor, items, unit));
  if (element_bytes) {
    return Strided{offset + static_cast<uint64_t>(picked.offset), std::move(picked.shape), std::move(picked.strides),
                   *element_bytes};
  }
  if (picked.is_whole) return whole(tensor, offset);
  if (bits == 0) {
    return refuse(tensor, "its type ", quoted(tensor.dtype_text), " is not known; it can be read as a whole only");
  }
  for (const uint64_t extent : picked.shape) {
    if (extent == 0) return Strided{offset, {0}, {1}, 1};
  }
  if (picked.has_unit_steps) {
    if (auto region = in_bytes(std::move(picked), bits, offset)) return *std::move(region);
  }
  return refuse(tensor, "elements of ", dtype_name(tensor.dtype), " have ", bits,
                " bits; a slice must begin and end on whole bytes and have step 1");
}

std::pair<Wide, Wide> reach_of(const Strided& region) {
  constexpr Wide kFarMax = Wide{1} << 64;  // 64 dimensions of it do not overflow
  Wide lowest = region.offset, highest = lowest + region.element_bytes;
  for (size_t dimension = 0; dimension < region.shape.size(); ++dimension) {
    const Wide distance = static_cast<Wide>(region.shape[dimension] - 1) * region.strides[dimension];
    (distance < 0 ? lowest : highest) += std::clamp(distance, -kFarMax, kFarMax);
  }
  return {lowest, highest};
}

Result<Strided> reinterpret(const Tensor& tensor, Dtype dtype, Strided region, uint64_t offset) {
  const std::optional<uint32_t> element_bytes = dtype_bytes(dtype);
  if (!element_bytes || region.strides.size() != region.shape.size())
    return fail(Code::invalid_argument, "region of ", quoted(tensor.name),
                ": elements of partial bytes, or too few strides");
  region.element_bytes = *element_bytes;
  if (region.element_count() == 0) return region;
  if (const auto [lowest, highest] = reach_of(region); lowest < 0 || highest > tensor.size_bytes) {
    return fail(Code::invalid_argument, "region of ", quoted(tensor.name), ": it leaves the tensor, which has ",
                tensor.size_bytes, " bytes");
  }
  region.offset += offset;
  return region;
}

// --- text --------------------------------------------------------------------------------------------------------

namespace {

class IndexText {
 public:
  // `text[begin, end)` is what stands between the brackets.
  IndexText(std::string_view text, size_t begin, size_t end) : text_(text), at_(begin), end_(end) {}

  Result<IndexItems> read() {
    IndexItems items;
    while (!at_end()) {
      TRY_ASSIGN(IndexItem item, read_item());
      items.push_back(item);
      if (items.size() > 2 * kRankMax) return refuse("too many indices");
      if (!at_end() && !accept(",")) return refuse("expected ',' or ']'");
    }
    return items;
  }

 private:
  Result<IndexItem> read_item() {
    if (accept("...")) return IndexItem{.kind = IndexItem::Kind::ellipsis};
    if (accept("None")) return IndexItem{.kind = IndexItem::Kind::new_axis};
    IndexItem item;
    TRY_ASSIGN(item.start, read_number());
    if (!accept(":")) {
      if (!item.start) return refuse("expected a number, a slice, '...' or 'None'");
      return IndexItem{.kind = IndexItem::Kind::integer, .integer = *item.start};
    }
    TRY_ASSIGN(item.stop, read_number());
    if (accept(":")) {
      TRY_ASSIGN(item.step, read_number());
    }
    return item;
  }

  Result<std::optional<int64_t>> read_number() {
    if (at_end() || (text_[at_] != '-' && (text_[at_] < '0' || text_[at_] > '9'))) return std::nullopt;
    int64_t number = 0;
    const auto [rest, problem] = std::from_chars(text_.data() + at_, text_.data() + end_, number);
    if (problem != std::errc()) return refuse("expected a 64-bit number");
    at_ = static_cast<size_t>(rest - text_.data());
    return number;
  }

  bool accept(std::string_view word) {
    if (at_end() || !text_.substr(at_, end_ - at_).starts_with(word)) return false;
    at_ += word.size();
    return true;
  }

  // Behind blanks.
  bool at_end() {
    while (at_ < end_ && text_[at_] == ' ') ++at_;
    return at_ == end_;
  }

  tl::unexpected<base::Error> refuse(std::string_view why) const {
    return fail(Code::invalid_argument, "view ", quoted(text_), ": ", why, " at character ", at_ + 1);
  }

  const std::string_view text_;
  size_t at_;
  const size_t end_;
};

}  // namespace

Result<ViewItem> parse_view_item(std::string_view text) {
  if (!text.ends_with(']')) return ViewItem{std::string(text), {}};
  size_t depth = 0;
  for (size_t at = text.size(); at-- > 0;) {
    depth += text[at] == ']';
    depth -= text[at] == '[';
    if (depth > 0) continue;
    TRY_ASSIGN(IndexItems items, IndexText(text, at + 1, text.size() - 1).read());
    return ViewItem{std::string(text.substr(0, at)), std::move(items)};
  }
  return ViewItem{std::string(text), {}};  // no '[' belongs to the last ']': all of it is a name
}

}  // namespace tensord::tensor
