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

TENSORD_AVX2 inline __m256i quiet_nans(__m256i bits) {
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256i is_nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(kInfinity));
  return _mm256_or_si256(bits, _mm256_and_si256(is_nan, _mm256_set1_epi32(kQuiet)));
}

// Eight elements as F32, and back. Streamed: past the caches, to a multiple of what is stored.
template <bool kStreamed>
TENSORD_AVX2 inline void store_128(std::byte* to, __m128i value) {
  auto* const place = reinterpret_cast<__m128i*>(to);
  kStreamed ? _mm_stream_si128(place, value) : _mm_storeu_si128(place, value);
}

struct F16By8 {
  static constexpr uint64_t kBytes = 2;
  TENSORD_AVX2 static __m256 load(const std::byte* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  template <bool kStreamed>
  TENSORD_AVX2 static void store(std::byte* to, __m256 floats) {
    store_128<kStreamed>(to, _mm256_cvtps_ph(floats, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

struct Bf16By8 {
  static constexpr uint64_t kBytes = 2;
  TENSORD_AVX2 static __m256 load(const std::byte* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(quiet_nans(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
  }
  template <bool kStreamed>
  TENSORD_AVX2 static void store(std::byte* to, __m256 floats) {
    const __m256i bits = _mm256_castps_si256(floats);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(floats, floats, _CMP_UNORD_Q));
    const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), is_odd));
    const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(kQuiet)), is_nan);
    const __m256i halves = _mm256_srli_epi32(kept, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
    store_128<kStreamed>(to, _mm256_castsi256_si128(packed));
  }
};

struct F32By8 {
  static constexpr uint64_t kBytes = 4;
  TENSORD_AVX2 static __m256 load(const std::byte* from) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  }
  template <bool kStreamed>
  TENSORD_AVX2 static void store(std::byte* to, __m256 floats) {
    auto* const place = reinterpret_cast<float*>(to);
    kStreamed ? _mm256_stream_ps(place, floats) : _mm256_storeu_ps(place, floats);
  }
};

template <typename From, typename To, bool kStreamed>
TENSORD_AVX2 uint64_t cast_groups(const std::byte* source, std::byte* target, uint64_t count) {
  uint64_t at = 0;
  for (; at + 8 <= count; at += 8) {
    To::template store<kStreamed>(target + at * To::kBytes, From::load(source + at * From::kBytes));
  }
  return at;
}

// Whole groups of 8; returns how many elements that were, 0 where there is no such way.
template <typename From, typename To>
uint64_t cast_by_8(const std::byte* source, std::byte* target, uint64_t count, CastPath path) {
  const bool streamed = path == CastPath::streamed && reinterpret_cast<uintptr_t>(target) % (8 * To::kBytes) == 0;
  return streamed ? cast_groups<From, To, true>(source, target, count)
                  : cast_groups<From, To, false>(source, target, count);
}

template <typename From>
uint64_t cast_by_8(const std::byte* source, Dtype target_dtype, std::byte* target, uint64_t count, CastPath path) {
  switch (target_dtype) {
    case Dtype::f16:
      return cast_by_8<From, F16By8>(source, target, count, path);
    case Dtype::bf16:
      return cast_by_8<From, Bf16By8>(source, target, count, path);
    case Dtype::f32:
      return cast_by_8<From, F32By8>(source, target, count, path);
    default:
      return 0;
  }
}

uint64_t cast_by_8(Dtype source_dtype, const std::byte* source, Dtype target_dtype, std::byte* target, uint64_t count,
                   CastPath path) {
  if (path == CastPath::portable || !has_avx2()) return 0;
  switch (source_dtype) {
    case Dtype::f16:
      return cast_by_8<F16By8>(source, target_dtype, target, count, path);
    case Dtype::bf16:
      return cast_by_8<Bf16By8>(source, target_dtype, target, count, path);
    case Dtype::f32:
      return cast_by_8<F32By8>(source, target_dtype, target, count, path);
    default:
      return 0;
  }
}

// --- many elements, through F32 --------------------------------------------------------------------------------------

// Any type but F64 into F32: exact.
void widen(Dtype dtype, const std::byte* source, std::byte* target, uint64_t count) {
  switch (dtype) {
    case Dtype::f16:
      return each(f16_to_f32, source, target, count);
    case Dtype::bf16:
      return each(bf16_to_f32, source, target, count);
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
void narrow(const std::byte* source, Dtype dtype, std::byte* target, uint64_t count) {
  switch (dtype) {
    case Dtype::f16:
      return each(f32_to_f16, source, target, count);
    case Dtype::bf16:
      return each(f32_to_bf16, source, target, count);
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
    return;
  }
  const uint64_t done = cast_by_8(source_dtype, source, target_dtype, target, count, path);
  source += done * source_step;
  target += done * target_step;
  count -= done;
  if (source_dtype == Dtype::f32) return narrow(source, target_dtype, target, count);
  if (source_dtype == Dtype::f64 && target_dtype == Dtype::f32) return each(f64_to_f32, source, target, count);
  if (source_dtype != Dtype::f64 && target_dtype == Dtype::f32) return widen(source_dtype, source, target, count);
  // Two steps through a block of F32 that stays in the first-level cache.
  constexpr uint64_t kBlock = 1024;
  std::array<std::byte, kBlock * 4> floats;
  for (uint64_t begin = 0; begin < count; begin += kBlock) {
    const uint64_t block = std::min(kBlock, count - begin);
    const std::byte* from = source + begin * source_step;
    if (source_dtype == Dtype::f64) {
      each(f64_to_odd_f32, from, floats.data(), block);
    } else {
      widen(source_dtype, from, floats.data(), block);
    }
    cast_elements(Dtype::f32, floats.data(), target_dtype, target + begin * target_step, block, path);
  }
}

}  // namespace tensord::memory
