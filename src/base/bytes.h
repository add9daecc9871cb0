// Sizes: checked arithmetic for numbers from outside, and sizes as people read and write them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/result.h"

namespace tensord::base {

inline constexpr uint64_t kKiB = 1024;
inline constexpr uint64_t kMiB = 1024 * kKiB;
inline constexpr uint64_t kGiB = 1024 * kMiB;

// nullopt when the result does not fit.
inline std::optional<uint64_t> checked_add(uint64_t a, uint64_t b) {
  uint64_t sum;
  if (__builtin_add_overflow(a, b, &sum)) return std::nullopt;
  return sum;
}
inline std::optional<uint64_t> checked_multiply(uint64_t a, uint64_t b) {
  uint64_t product;
  if (__builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

// `alignment` is a power of two.
inline constexpr uint64_t align_up(uint64_t value, uint64_t alignment) {
  return (value + alignment - 1) & ~(alignment - 1);
}

// 2147483648 -> "2.00 GiB", 512 -> "512 B".
std::string human_bytes(uint64_t bytes);

// "8GiB", "512 MiB", "2G", "1000": powers of 1024; Code::invalid_argument says what is accepted.
Result<uint64_t> parse_bytes(std::string_view text);

// Lower-case hexadecimal, two characters a byte.
std::string to_hex(const void* data, size_t size_bytes);

}  // namespace tensord::base
