// Random views, copied by plans, against numpy's rules spelled out element by element.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>

#include "memory/cast.h"
#include "memory/copy.h"
#include "tensor/plan_testing.h"
#include "tensor/plan_transform_testing.h"
#include "tensor/view.h"
#include "tensor/view_testing.h"

namespace tensord::memory {
namespace {

using tensor::Dtype;
using tensor::IndexItem;
using tensor::IndexItems;
using tensor::Strided;
using tensor::Tensor;
using tensor::Wanted;

using Bytes = std::vector<std::byte>;

// What one dimension of the result picks from one of the tensor; none for a new axis.
struct Axis {
  std::vector<int64_t> indices;
  std::optional<size_t> dimension;
};

// range(*slice(start, stop, step).indices(extent)), by walking.
std::vector<int64_t> walk(const IndexItem& item, int64_t extent) {
  const int64_t step = item.step.value_or(1);
  const int64_t before = step < 0 ? -1 : 0;
  const int64_t behind = step < 0 ? extent - 1 : extent;
  const auto bound = [&](int64_t value) {
    if (value < 0) value += extent;
    return std::clamp(value, before, std::max(behind, before));
  };
  const int64_t start = item.start ? bound(*item.start) : (step < 0 ? behind : before);
  const int64_t stop = item.stop ? bound(*item.stop) : (step < 0 ? before : behind);
  std::vector<int64_t> indices;
  for (int64_t at = start; step > 0 ? at < stop : at > stop; at += step) indices.push_back(at);
  return indices;
}

class Trial {
 public:
  explicit Trial(uint64_t seed) : random_(seed) {}

  void run() {
    const size_t tensor_count = 1 + below(4);
    Bytes source;
    std::vector<Tensor> tensors(tensor_count);
    std::vector<Wanted> wanted(tensor_count);
    uint64_t target_end = below(40);
    for (size_t at = 0; at < tensor_count; ++at) {
      tensors[at] = make_tensor(source);
      ASSERT_NO_FATAL_FAILURE(want(tensors[at], wanted[at], target_end));
    }
    const Bytes before(target_end + below(40), std::byte{0xEE});
    Bytes got = before;
    expected_ = before;
    for (size_t at = 0; at < tensor_count; ++at) place(tensors[at], axes_[at], source, wanted[at]);

    const auto plan = tensor::compile(wanted);
    ASSERT_TRUE(plan) << plan.error().message;
    const auto checked = check_plan(*plan, source.size(), got.size());
    ASSERT_TRUE(checked) << checked.error().message << "\n" << to_text(*plan);
    CopyOptions options;
    options.thread_count = static_cast<int>(1 + below(3));
    options.task_bytes_max = below(2) == 0 ? kTaskBytes : 1 + below(500);
    ASSERT_TRUE(execute(*plan, source, got, options));
    ASSERT_TRUE(got == expected_) << to_text(*plan);
    ASSERT_TRUE(execute(canonical(*plan), source, got, options));
    ASSERT_TRUE(got == expected_) << to_text(canonical(*plan));
  }

 private:
  uint64_t below(uint64_t end) { return std::uniform_int_distribution<uint64_t>(0, end - 1)(random_); }

  Tensor make_tensor(Bytes& source) {
    static constexpr Dtype kDtypes[] = {Dtype::u8,  Dtype::f8_e4m3, Dtype::f16, Dtype::bf16,
                                        Dtype::f32, Dtype::f64,     Dtype::c64};
    Tensor tensor;
    tensor.name = "w";
    tensor.dtype = kDtypes[below(std::size(kDtypes))];
    for (size_t rank = below(6); rank > 0; --rank)
      tensor.shape.push_back(below(20) == 0 ? 0 : 1 + below(rank > 3 ? 5 : 12));
    tensor.offset = source.size() + below(9);
    tensor.size_bytes = *tensor::element_count(tensor.shape) * *dtype_bytes(tensor.dtype);
    source.resize(tensor.offset + tensor.size_bytes + below(9));
    for (std::byte& byte : source) byte = static_cast<std::byte>(random_());
    return tensor;
  }

  std::optional<int64_t> bound(uint64_t extent) {
    if (below(3) == 0) return std::nullopt;
    return static_cast<int64_t>(below(2 * extent + 5)) - static_cast<int64_t>(extent) - 2;
  }

  IndexItems make_items(const Tensor& tensor) {
    IndexItems items;
    const size_t rank = tensor.shape.size();
    const size_t ellipsis = below(2) == 0 ? below(rank + 1) : rank + 1;
    const size_t hidden = ellipsis <= rank ? below(rank - ellipsis + 1) : 0;
    for (size_t dimension = 0; dimension <= rank; ++dimension) {
      while (below(8) == 0) items.push_back({.kind = IndexItem::Kind::new_axis});
      if (dimension == ellipsis) {
        items.push_back({.kind = IndexItem::Kind::ellipsis});
        dimension += hidden;
      }
      if (dimension >= rank || (ellipsis > rank && below(8) == 0)) break;
      const uint64_t extent = tensor.shape[dimension];
      IndexItem item;
      if (extent > 0 && below(4) == 0) {
        item.kind = IndexItem::Kind::integer;
        item.integer = static_cast<int64_t>(below(2 * extent)) - static_cast<int64_t>(extent);
      } else if (below(3) > 0) {
        item.start = bound(extent);
        item.stop = bound(extent);
        if (below(2) == 0)
          item.step = below(2) == 0 ? -1 - static_cast<int64_t>(below(3)) : 1 + static_cast<int64_t>(below(3));
      }
      items.push_back(item);
    }
    return items;
  }

  // One axis for each dimension of the result; integers move `fixed_`.
  std::vector<Axis> pick(const Tensor& tensor, const IndexItems& items) {
    std::vector<Axis> axes;
    fixed_.emplace_back(tensor.shape.size(), 0);
    const auto consumes = [](const IndexItem& item) {
      return item.kind == IndexItem::Kind::slice || item.kind == IndexItem::Kind::integer;
    };
    const auto taken = static_cast<size_t>(std::count_if(items.begin(), items.end(), consumes));
    size_t dimension = 0;
    const auto whole = [&] {
      axes.push_back({walk({}, static_cast<int64_t>(tensor.shape[dimension])), dimension});
      ++dimension;
    };
    for (const IndexItem& item : items) {
      if (item.kind == IndexItem::Kind::new_axis) axes.push_back({{0}, std::nullopt});
      if (item.kind == IndexItem::Kind::ellipsis) {
        for (size_t count = tensor.shape.size() - taken; count > 0; --count) whole();
      }
      if (!consumes(item)) continue;
      const auto extent = static_cast<int64_t>(tensor.shape[dimension]);
      if (item.kind == IndexItem::Kind::integer) {
        fixed_.back()[dimension] = item.integer < 0 ? item.integer + extent : item.integer;
      } else {
        axes.push_back({walk(item, extent), dimension});
      }
      ++dimension;
    }
    while (dimension < tensor.shape.size()) whole();
    return axes;
  }

  // A target of the view's shape in any order of dimensions, padded, some of them backwards, behind `end`.
  Strided make_target(const std::vector<uint64_t>& shape, uint32_t element_bytes, uint64_t& end) {
    Strided to{end, shape, std::vector<int64_t>(shape.size()), element_bytes};
    std::vector<size_t> order(shape.size());
    std::iota(order.begin(), order.end(), size_t{0});
    if (below(3) > 0) std::reverse(order.begin(), order.end());  // row-major, most of the time
    if (below(3) == 0) std::shuffle(order.begin(), order.end(), random_);
    uint64_t stride = element_bytes;
    for (const size_t dimension : order) {
      if (below(4) == 0) stride += below(10);
      to.strides[dimension] = static_cast<int64_t>(stride);
      stride *= std::max<uint64_t>(shape[dimension], 1);
      if (shape[dimension] > 0 && below(5) == 0) {
        to.offset += static_cast<uint64_t>(to.strides[dimension]) * (shape[dimension] - 1);
        to.strides[dimension] = -to.strides[dimension];
      }
    }
    end += stride + element_bytes + below(20);
    return to;
  }

  void want(const Tensor& tensor, Wanted& wanted, uint64_t& target_end) {
    const IndexItems items = make_items(tensor);
    const std::string text = to_text(tensor::ViewItem{tensor.name, items});
    SCOPED_TRACE(text);
    const auto parsed = tensor::parse_view_item(text);
    ASSERT_TRUE(parsed) << parsed.error().message;
    ASSERT_EQ(parsed->items, items);
    const auto from = resolve(tensor, items, tensor.offset);
    ASSERT_TRUE(from) << from.error().message;
    axes_.push_back(pick(tensor, items));
    ASSERT_EQ(from->shape.size(), axes_.back().size());
    for (size_t axis = 0; axis < from->shape.size(); ++axis) {
      ASSERT_EQ(from->shape[axis], axes_.back()[axis].indices.size());
    }
    wanted.label = tensor.name;
    wanted.from = *from;
    wanted.source_dtype = wanted.target_dtype = tensor.dtype;
    if (tensor::can_cast(tensor.dtype, Dtype::f32) && below(2) == 0) {
      static constexpr Dtype kFloats[] = {Dtype::f16, Dtype::bf16, Dtype::f32, Dtype::f64};
      wanted.target_dtype = kFloats[below(4)];
    }
    wanted.to = make_target(from->shape, *dtype_bytes(wanted.target_dtype), target_end);
  }

  // Element by element.
  void place(const Tensor& tensor, const std::vector<Axis>& axes, const Bytes& source, const Wanted& wanted) {
    const uint32_t source_bytes = *dtype_bytes(wanted.source_dtype);
    const uint64_t element_count = wanted.to.element_count();
    for (uint64_t number = 0; number < element_count; ++number) {
      std::vector<int64_t> index = fixed_[static_cast<size_t>(&axes - axes_.data())];
      uint64_t left = number;
      uint64_t to = wanted.to.offset;
      for (size_t axis = axes.size(); axis-- > 0;) {
        const uint64_t at = left % axes[axis].indices.size();
        left /= axes[axis].indices.size();
        if (axes[axis].dimension) index[*axes[axis].dimension] = axes[axis].indices[at];
        to += at * static_cast<uint64_t>(wanted.to.strides[axis]);
      }
      uint64_t from = 0;
      for (size_t dimension = 0; dimension < index.size(); ++dimension) {
        from = from * tensor.shape[dimension] + static_cast<uint64_t>(index[dimension]);
      }
      const std::byte* element = source.data() + tensor.offset + from * source_bytes;
      if (wanted.source_dtype == wanted.target_dtype) {
        std::memcpy(expected_.data() + to, element, source_bytes);
      } else {
        cast_elements(wanted.source_dtype, element, wanted.target_dtype, expected_.data() + to, 1, CastPath::portable);
      }
    }
  }

  std::mt19937_64 random_;
  std::vector<std::vector<Axis>> axes_;      // by tensor
  std::vector<std::vector<int64_t>> fixed_;  // by tensor: where integer indices point
  Bytes expected_;
};

TEST(Views, random_views_equal_the_reference_element_by_element) {
  const char* given = std::getenv("TENSORD_SEED");
  const uint64_t seed = given ? std::strtoull(given, nullptr, 10) : std::random_device()();
  for (uint64_t round = 0; round < (given ? 1 : 3000); ++round) {
    SCOPED_TRACE("TENSORD_SEED=" + std::to_string(seed + round));
    Trial(seed + round).run();
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace tensord::memory
