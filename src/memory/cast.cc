#include "memory/cast.h"

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "tensor/plan.h"

namespace tensord::memory {

using tensor::Dtype;

namespace {

template <typename T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename T>
void store(std::byte* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

// --- one element, portable -----------------------------------------------------------------------------------------

constexpr uint32_t kSign = 0x80000000u;
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kQuiet = 0x00400000u;

// A small float with `exponent_bits` and `mantissa_bits` as F32, exactly. `has_infinity` is false for F8_E4M3, where
// only the all-ones pattern is NaN (OCP 8-bit floating point specification, revision 1.0).
constexpr float widen_bits(uint32_t value, int exponent_bits, int mantissa_bits, bool has_infinity) {
  const uint32_t sign = (value >> (exponent_bits + mantissa_bits)) << 31;
  const uint32_t exponent_max = (1u << exponent_bits) - 1;
  const uint32_t exponent = (value >> mantissa_bits) & exponent_max;
  const uint32_t mantissa = value & ((1u << mantissa_bits) - 1);
  const bool is_last = exponent == exponent_max;
  if (is_last && (has_infinity ? mantissa != 0 : mantissa == (1u << mantissa_bits) - 1)) {
    return std::bit_cast<float>(sign | kInfinity | kQuiet | mantissa << (23 - mantissa_bits));
  }
  if (is_last && has_infinity) return std::bit_cast<float>(sign | kInfinity);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  if (exponent == 0) {
    // mantissa x 2^(1 - bias - mantissa_bits): a product of two normal numbers, hence exact.
    const float unit = std::bit_cast<float>(static_cast<uint32_t>(127 + 1 - bias - mantissa_bits) << 23);
    const float magnitude = static_cast<float>(mantissa) * unit;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | (exponent + 127 - static_cast<uint32_t>(bias)) << 23 |
                              mantissa << (23 - mantissa_bits));
}

float f16_to_f32(uint16_t value) { return widen_bits(value, 5, 10, true); }

float f64_to_f32(double value) { return static_cast<float>(value); }
double f32_to_f64(float value) { return value; }

float bf16_to_f32(uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  return std::bit_cast<float>((bits & ~kSign) > kInfinity ? bits | kQuiet : bits);
}

uint16_t f32_to_bf16(uint32_t bits) {
  if ((bits & ~kSign) > kInfinity) return static_cast<uint16_t>((bits | kQuiet) >> 16);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

uint16_t f32_to_f16(uint32_t bits) {
  const uint16_t sign = static_cast<uint16_t>((bits & kSign) >> 16);
  const uint32_t magnitude = bits & ~kSign;
  if (magnitude > kInfinity) return static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
  if (magnitude >= 0x47800000u) return sign | 0x7c00;  // 65536 and up; 65520 to 65536 rounds up below
  if (magnitude >= 0x38800000u) {                      // 2^-14 and up: normal
    const uint32_t rebased = magnitude - 0x38000000u;  // exponent bias 127 - 15
    return static_cast<uint16_t>(sign | (rebased + 0xfff + ((rebased >> 13) & 1)) >> 13);
  }
  if (magnitude < 0x33000000u) return sign;  // below 2^-25: half of the smallest subnormal
  const uint32_t exponent = magnitude >> 23;
  const uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000;
  const uint32_t shift = 126 - exponent;  // the unit of a subnormal is 2^-24
  const uint32_t kept = mantissa >> shift;
  const uint32_t rest = mantissa & ((1u << shift) - 1);
  const uint32_t half = 1u << (shift - 1);
  return static_cast<uint16_t>(sign | (kept + (rest > half || (rest == half && (kept & 1)))));
}

// Rounds to odd: the result keeps telling on which side of a tie of a narrower type the value was, so that rounding it
// again to F16 or BF16 gives what rounding the F64 at once would have (Boldo and Melquiond, "Emulation of a FMA and
// correctly rounded sums", 2008).
uint32_t f64_to_odd_f32(double value) {
  const float nearest = static_cast<float>(value);
  const uint32_t bits = std::bit_cast<uint32_t>(nearest);
  if (std::isnan(value) || static_cast<double>(nearest) == value || (bits & 1)) return bits;
  return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? bits - 1 : bits + 1;
}

template <int kExponentBits, int kMantissaBits, bool kHasInfinity>
constexpr std::array<float, 256> float8_table() {
  std::array<float, 256> table{};
  for (uint32_t value = 0; value < 256; ++value) {
    table[value] = widen_bits(value, kExponentBits, kMantissaBits, kHasInfinity);
  }
  return table;
}
constexpr std::array<float, 256> kE4m3 = float8_table<4, 3, false>();
constexpr std::array<float, 256> kE5m2 = float8_table<5, 2, true>();
float e4m3_to_f32(uint8_t value) { return kE4m3[value]; }
float e5m2_to_f32(uint8_t value) { return kE5m2[value]; }

// Elements [at, count), one by one.
template <typename Source, typename Target>
void each(Target (*convert)(Source), const std::byte* source, std::byte* target, uint64_t count, uint64_t at = 0) {
  for (; at < count; ++at) {
    store(target + at * sizeof(Target), convert(load<Source>(source + at * sizeof(Source))));
  }
}

// --- many elements with AVX2 and F16C --------------------------------------------------------------------------------

#define TENSORD_AVX2 __attribute__((target("avx2,f16c")))

bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2");  // and so F16C, which is older; clang 14 cannot ask for it
  return has;
}

// Each converts whole groups of 8 and returns how many elements that were.

TENSORD_AVX2 uint64_t f16_to_f32_by_8(const std::byte* source, std::byte* target, uint64_t count) {
  uint64_t at = 0;
  for (; at + 8 <= count; at += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at * 2));
    _mm256_storeu_ps(reinterpret_cast<float*>(target + at * 4), _mm256_cvtph_ps(halves));
  }
  return at;
}

TENSORD_AVX2 uint64_t f32_to_f16_by_8(const std::byte* source, std::byte* target, uint64_t count) {
  uint64_t at = 0;
  for (; at + 8 <= count; at += 8) {
    const __m256 floats = _mm256_loadu_ps(reinterpret_cast<const float*>(source + at * 4));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + at * 2),
                     _mm256_cvtps_ph(floats, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  return at;
}

TENSORD_AVX2 uint64_t bf16_to_f32_by_8(const std::byte* source, std::byte* target, uint64_t count) {
  const __m256i infinity = _mm256_set1_epi32(kInfinity);
  const __m256i magnitude_mask = _mm256_set1_epi32(0x7fffffff);
  const __m256i quiet = _mm256_set1_epi32(kQuiet);
  uint64_t at = 0;
  for (; at + 8 <= count; at += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at * 2));
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
    const __m256i is_nan = _mm256_cmpgt_epi32(_mm256_and_si256(bits, magnitude_mask), infinity);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + at * 4),
                        _mm256_or_si256(bits, _mm256_and_si256(is_nan, quiet)));
  }
  return at;
}

TENSORD_AVX2 uint64_t f32_to_bf16_by_8(const std::byte* source, std::byte* target, uint64_t count) {
  const __m256i infinity = _mm256_set1_epi32(kInfinity);
  const __m256i magnitude_mask = _mm256_set1_epi32(0x7fffffff);
  const __m256i quiet = _mm256_set1_epi32(kQuiet);
  const __m256i almost_half = _mm256_set1_epi32(0x7fff);
  const __m256i one = _mm256_set1_epi32(1);
  uint64_t at = 0;
  for (; at + 8 <= count; at += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + at * 4));
    const __m256i is_nan = _mm256_cmpgt_epi32(_mm256_and_si256(bits, magnitude_mask), infinity);
    const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(almost_half, is_odd));
    const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, quiet), is_nan);
    const __m256i halves = _mm256_srli_epi32(kept, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + at * 2), _mm256_castsi256_si128(packed));
  }
  return at;
}

// --- many elements, through F32 --------------------------------------------------------------------------------------

// Any type but F64 into F32: exact.
void widen(Dtype dtype, const std::byte* source, std::byte* target, uint64_t count, CastPath path) {
  const bool is_fast = path == CastPath::fastest && has_avx2();
  uint64_t at = 0;
  switch (dtype) {
    case Dtype::f16:
      if (is_fast) at = f16_to_f32_by_8(source, target, count);
      return each(f16_to_f32, source, target, count, at);
    case Dtype::bf16:
      if (is_fast) at = bf16_to_f32_by_8(source, target, count);
      return each(bf16_to_f32, source, target, count, at);
    case Dtype::f8_e4m3:
      return each(e4m3_to_f32, source, target, count);
    case Dtype::f8_e5m2:
      return each(e5m2_to_f32, source, target, count);
    default:
      CHECK(dtype == Dtype::f32);
      std::memcpy(target, source, count * 4);
  }
}

// F32 into any type: rounded once.
void narrow(const std::byte* source, Dtype dtype, std::byte* target, uint64_t count, CastPath path) {
  const bool is_fast = path == CastPath::fastest && has_avx2();
  uint64_t at = 0;
  switch (dtype) {
    case Dtype::f16:
      if (is_fast) at = f32_to_f16_by_8(source, target, count);
      return each(f32_to_f16, source, target, count, at);
    case Dtype::bf16:
      if (is_fast) at = f32_to_bf16_by_8(source, target, count);
      return each(f32_to_bf16, source, target, count, at);
    case Dtype::f64:
      return each(f32_to_f64, source, target, count);
    default:
      CHECK(dtype == Dtype::f32);
      std::memcpy(target, source, count * 4);
  }
}

}  // namespace

void cast_elements(Dtype source_dtype, const std::byte* source, Dtype target_dtype, std::byte* target, uint64_t count,
                   CastPath path) {
  CHECK(tensor::can_cast(source_dtype, target_dtype));
  const uint32_t source_step = *tensor::dtype_bytes(source_dtype);
  const uint32_t target_step = *tensor::dtype_bytes(target_dtype);
  if (source_dtype == target_dtype) {
    std::memcpy(target, source, count * source_step);
  } else if (source_dtype == Dtype::f32) {
    narrow(source, target_dtype, target, count, path);
  } else if (source_dtype == Dtype::f64 && target_dtype == Dtype::f32) {
    each(f64_to_f32, source, target, count);
  } else if (source_dtype != Dtype::f64 && target_dtype == Dtype::f32) {
    widen(source_dtype, source, target, count, path);
  } else {
    // Two steps through a block of F32 that stays in the first-level cache.
    constexpr uint64_t kBlock = 1024;
    std::array<std::byte, kBlock * 4> floats;
    for (uint64_t begin = 0; begin < count; begin += kBlock) {
      const uint64_t block = std::min(kBlock, count - begin);
      const std::byte* from = source + begin * source_step;
      if (source_dtype == Dtype::f64) {
        each(f64_to_odd_f32, from, floats.data(), block);
      } else {
        widen(source_dtype, from, floats.data(), block, path);
      }
      narrow(floats.data(), target_dtype, target + begin * target_step, block, path);
    }
  }
}

}  // namespace tensord::memory
