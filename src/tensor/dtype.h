// Element types: names as safetensors writes them, sizes in bits.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace tensord::tensor {

// The numbers are part of the protocol and of the C ABI: append only. The names are those of the safetensors
// format, release 0.8. Sub-byte types (F4, F6) are packed without gaps in memory order.
enum class Dtype : uint8_t {
  opaque = 0,  // a name we do not know: whole tensors only, no slices, no casts
  boolean = 1,
  f4 = 2,
  f6_e2m3 = 3,
  f6_e3m2 = 4,
  u8 = 5,
  i8 = 6,
  f8_e5m2 = 7,
  f8_e4m3 = 8,
  f8_e8m0 = 9,
  f8_e4m3fnuz = 10,
  f8_e5m2fnuz = 11,
  i16 = 12,
  u16 = 13,
  f16 = 14,
  bf16 = 15,
  i32 = 16,
  u32 = 17,
  f32 = 18,
  c64 = 19,
  f64 = 20,
  i64 = 21,
  u64 = 22,
};
inline constexpr int kDtypeCount = 23;

// "BF16" -> Dtype::bf16; Dtype::opaque for a name that is not known.
Dtype parse_dtype(std::string_view name);
std::string_view dtype_name(Dtype dtype);  // "?" for opaque

// Bits of one element; 0 for opaque.
uint32_t dtype_bits(Dtype dtype);

// Bytes of one element; nullopt where an element is no whole number of bytes (sub-byte types, opaque).
std::optional<uint32_t> dtype_bytes(Dtype dtype);

}  // namespace tensord::tensor
