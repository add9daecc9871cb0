#include "tensor/dtype.h"

#include <array>

namespace tensord::tensor {

namespace {

struct Row {
  std::string_view name;
  uint32_t bits;
};

// In the order of the enum.
constexpr std::array<Row, kDtypeCount> kRows{{
    {"?", 0},    {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},
    {"I8", 8},   {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8},
    {"I16", 16}, {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},
    {"F32", 32}, {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64},
}};

const Row& row_of(Dtype dtype) {
  const auto number = static_cast<size_t>(dtype);
  return kRows[number < kRows.size() ? number : 0];
}

}  // namespace

Dtype parse_dtype(std::string_view name) {
  for (size_t i = 1; i < kRows.size(); ++i) {
    if (kRows[i].name == name) return static_cast<Dtype>(i);
  }
  return Dtype::opaque;
}

std::string_view dtype_name(Dtype dtype) { return row_of(dtype).name; }

uint32_t dtype_bits(Dtype dtype) { return row_of(dtype).bits; }

std::optional<uint32_t> dtype_bytes(Dtype dtype) {
  const uint32_t bits = dtype_bits(dtype);
  if (bits == 0 || bits % 8 != 0) return std::nullopt;
  return bits / 8;
}

}  // namespace tensord::tensor
