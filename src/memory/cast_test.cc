#include "memory/cast.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace tensord::memory {
namespace {

using tensor::Dtype;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// A float format, and its values by the book: slow, and nothing in common with the code under test.
struct Format {
  Dtype dtype;
  int exponent_bits, mantissa_bits;
  bool has_infinity = true;

  uint32_t bit_count() const { return 1u + static_cast<uint32_t>(exponent_bits + mantissa_bits); }
  double value(uint32_t pattern) const {
    const uint32_t exponent_max = (1u << exponent_bits) - 1;
    const uint32_t exponent = (pattern >> mantissa_bits) & exponent_max;
    const uint32_t mantissa = pattern & ((1u << mantissa_bits) - 1);
    const double sign = pattern >> (exponent_bits + mantissa_bits) ? -1 : 1;
    const int bias = (1 << (exponent_bits - 1)) - 1;
    if (exponent == exponent_max && has_infinity) return mantissa == 0 ? sign * kInfinity : kNan;
    if (exponent == exponent_max && mantissa == (1u << mantissa_bits) - 1) return kNan;
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * std::ldexp((1u << mantissa_bits) + mantissa, static_cast<int>(exponent) - bias - mantissa_bits);
  }
};
constexpr Format kF16{Dtype::f16, 5, 10};
constexpr Format kBf16{Dtype::bf16, 8, 7};
constexpr Format kE4m3{Dtype::f8_e4m3, 4, 3, false};
constexpr Format kE5m2{Dtype::f8_e5m2, 5, 2};

template <typename Target, typename Source>
std::vector<Target> cast(Dtype from, const std::vector<Source>& source, Dtype to, CastPath path) {
  std::vector<Target> target(source.size());
  cast_elements(from, reinterpret_cast<const std::byte*>(source.data()), to,
                reinterpret_cast<std::byte*>(target.data()), source.size(), path);
  return target;
}

template <typename Pattern>
std::vector<Pattern> all_patterns(const Format& format) {
  std::vector<Pattern> patterns;
  for (uint32_t pattern = 0; pattern < (1u << format.bit_count()); ++pattern) {
    patterns.push_back(static_cast<Pattern>(pattern));
  }
  return patterns;
}

bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

template <typename Pattern>
void expect_exact(const Format& format) {
  const auto patterns = all_patterns<Pattern>(format);
  for (const CastPath path : {CastPath::fastest, CastPath::streamed, CastPath::portable}) {
    const auto floats = cast<float>(format.dtype, patterns, Dtype::f32, path);
    const auto doubles = cast<double>(format.dtype, patterns, Dtype::f64, path);
    for (size_t at = 0; at < patterns.size(); ++at) {
      ASSERT_TRUE(same(floats[at], format.value(patterns[at]))) << at;
      ASSERT_TRUE(same(doubles[at], format.value(patterns[at]))) << at;
    }
  }
}

TEST(Cast, every_value_of_a_small_type_is_exact_in_a_large_one) {
  expect_exact<uint16_t>(kF16);
  expect_exact<uint16_t>(kBf16);
  expect_exact<uint8_t>(kE4m3);
  expect_exact<uint8_t>(kE5m2);
}

// Every value of the format, every midpoint between two of them, and the values next to each midpoint.
struct Rounding {
  double input;
  uint16_t expected;
};
std::vector<Rounding> roundings(const Format& format, const auto& next_after) {
  std::vector<Rounding> out;
  const uint16_t sign = 0x8000;
  const uint32_t infinity = ((1u << format.exponent_bits) - 1) << format.mantissa_bits;
  for (uint32_t low = 0; low < infinity; ++low) {
    const double below = format.value(low);
    // What would follow the largest number, were there more exponents: from half way on it is infinity.
    const double above = low + 1 == infinity ? 2 * format.value(low) - format.value(low - 1) : format.value(low + 1);
    const double middle = (below + above) / 2;
    const auto add = [&](double input, uint32_t pattern) {
      out.push_back({input, static_cast<uint16_t>(pattern)});
      out.push_back({-input, static_cast<uint16_t>(pattern | sign)});
    };
    add(below, low);
    add(next_after(middle, 0), low);
    add(middle, low + (low & 1));
    add(next_after(middle, kInfinity), low + 1);
  }
  out.push_back({kInfinity, static_cast<uint16_t>(infinity)});
  out.push_back({-kInfinity, static_cast<uint16_t>(infinity | sign)});
  return out;
}

template <typename Source>
void expect_nearest(const Format& format, Dtype from) {
  const auto table = roundings(format, [](double value, double towards) {
    return static_cast<double>(std::nextafter(static_cast<Source>(value), static_cast<Source>(towards)));
  });
  std::vector<Source> inputs;
  for (const Rounding& rounding : table) inputs.push_back(static_cast<Source>(rounding.input));
  for (const CastPath path : {CastPath::fastest, CastPath::streamed, CastPath::portable}) {
    const auto outputs = cast<uint16_t>(from, inputs, format.dtype, path);
    for (size_t at = 0; at < table.size(); ++at) {
      ASSERT_EQ(outputs[at], table[at].expected) << std::hexfloat << table[at].input;
    }
  }
}

TEST(Cast, rounds_to_the_nearest_and_ties_to_even) {
  expect_nearest<float>(kF16, Dtype::f32);
  expect_nearest<float>(kBf16, Dtype::f32);
}

TEST(Cast, rounds_an_f64_once_not_twice) {
  expect_nearest<double>(kF16, Dtype::f64);
  expect_nearest<double>(kBf16, Dtype::f64);
}

TEST(Cast, between_the_two_16_bit_types_values_round_as_from_f32) {
  for (const auto& [from, to] : {std::pair{kF16, kBf16}, {kBf16, kF16}}) {
    const auto patterns = all_patterns<uint16_t>(from);
    const auto direct = cast<uint16_t>(from.dtype, patterns, to.dtype, CastPath::fastest);
    const auto floats = cast<float>(from.dtype, patterns, Dtype::f32, CastPath::portable);
    EXPECT_EQ(direct, cast<uint16_t>(Dtype::f32, floats, to.dtype, CastPath::portable));
    EXPECT_EQ(direct, cast<uint16_t>(from.dtype, patterns, to.dtype, CastPath::portable));
  }
}

TEST(Cast, all_8_bit_values_round_into_16_bits) {
  for (const Format& from : {kE4m3, kE5m2}) {
    const auto patterns = all_patterns<uint8_t>(from);
    const auto floats = cast<float>(from.dtype, patterns, Dtype::f32, CastPath::portable);
    for (const Format& to : {kF16, kBf16}) {
      EXPECT_EQ(cast<uint16_t>(from.dtype, patterns, to.dtype, CastPath::fastest),
                cast<uint16_t>(Dtype::f32, floats, to.dtype, CastPath::portable));
    }
  }
}

TEST(Cast, f64_to_f32_at_the_edges) {
  const double huge = std::numeric_limits<float>::max();
  const double tiny = std::numeric_limits<float>::denorm_min();
  const std::vector<double> inputs = {0.0,  -0.0,     huge,        huge * 1.0000001, -1e300,
                                      tiny, tiny / 2, tiny * 0.75, kInfinity,        0.1};
  const auto outputs = cast<float>(Dtype::f64, inputs, Dtype::f32, CastPath::fastest);
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> expected = {
      0.0f, -0.0f, static_cast<float>(huge), infinity, -infinity, 0x1p-149f, 0.0f, 0x1p-149f, infinity, 0.1f};
  for (size_t at = 0; at < inputs.size(); ++at) EXPECT_TRUE(same(outputs[at], expected[at])) << inputs[at];
}

TEST(Cast, nan_stays_nan_whatever_its_payload) {
  std::vector<uint32_t> nans;
  for (const uint32_t payload : {0x000001u, 0x001fffu, 0x00ffffu, 0x3fffffu, 0x400000u, 0x7fffffu}) {
    nans.push_back(0x7f800000u | payload);
    nans.push_back(0xff800000u | payload);
  }
  nans.resize(16, 0x7fc00000u);  // two whole groups of eight
  for (const CastPath path : {CastPath::fastest, CastPath::streamed, CastPath::portable}) {
    for (const Format& format : {kF16, kBf16}) {
      for (const uint16_t pattern : cast<uint16_t>(Dtype::f32, nans, format.dtype, path)) {
        EXPECT_TRUE(std::isnan(format.value(pattern))) << pattern;
      }
    }
    for (const double value : cast<double>(Dtype::f32, nans, Dtype::f64, path)) EXPECT_TRUE(std::isnan(value));
  }
  for (const Format& format : {kF16, kBf16}) {
    const auto patterns = cast<uint16_t>(Dtype::f64, std::vector<double>{kNan, -kNan}, format.dtype, CastPath::fastest);
    for (const uint16_t pattern : patterns) EXPECT_TRUE(std::isnan(format.value(pattern)));
  }
}

TEST(Cast, both_paths_agree_bit_by_bit_at_any_alignment_and_count) {
  uint64_t state = 1;
  std::vector<std::byte> source(8 * 2100 + 8);
  for (std::byte& byte : source) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    byte = static_cast<std::byte>(state >> 56);
  }
  const Dtype targets[] = {Dtype::f16, Dtype::bf16, Dtype::f32, Dtype::f64};
  for (const Dtype from : {Dtype::f8_e4m3, Dtype::f8_e5m2, Dtype::f16, Dtype::bf16, Dtype::f32, Dtype::f64}) {
    for (const Dtype to : targets) {
      for (const uint64_t count : {0, 1, 7, 8, 9, 1023, 1024, 1025, 2100}) {
        const uint64_t shift = count % 8;
        std::vector<std::byte> fast(count * 8 + 8), portable(count * 8 + 8);
        cast_elements(from, source.data() + shift, to, fast.data() + shift, count, CastPath::fastest);
        cast_elements(from, source.data() + shift, to, portable.data() + shift, count, CastPath::portable);
        ASSERT_TRUE(fast == portable) << dtype_name(from) << " to " << dtype_name(to) << " x " << count;
      }
    }
  }
}

}  // namespace
}  // namespace tensord::memory
