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

// --- what each type has: one element as F32 and out of it, and eight at a time with AVX2 and F16C ----------------------

#define TENSORD_AVX2 __attribute__((target("avx2,f16c")))

bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2");  // and so F16C, which is older; clang 14 cannot ask for it
  return has;
}

// Streamed: past the caches, to a multiple of what is stored.
template <bool kStreamed>
TENSORD_AVX2 inline void store_128(std::byte* to, __m128i value) {
  auto* const place = reinterpret_cast<__m128i*>(to);
  kStreamed ? _mm_stream_si128(place, value) : _mm_storeu_si128(place, value);
}

template <bool kStreamed>
TENSORD_AVX2 inline void store_256(std::byte* to, __m256i value) {
  auto* const place = reinterpret_cast<__m256i*>(to);
  kStreamed ? _mm256_stream_si256(place, value) : _mm256_storeu_si256(place, value);
}

struct F16 {
  using Element = uint16_t;
  static float widen(uint16_t value) { return widen_bits(value, 5, 10, true); }
  static uint16_t narrow(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint16_t sign = static_cast<uint16_t>((bits & kSign) >> 16);
    const uint32_t magnitude = bits & ~kSign;
    if (magnitude > kInfinity) return static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
    if (magnitude >= 0x47800000u) return sign | 0x7c00;  // 65536 and up; 65520 to 65536 rounds up below
    if (magnitude >= 0x38800000u) {                      // 2^-14 and up: normal
      const uint32_t rebased = magnitude - 0x38000000u;  // exponent bias 127 - 15
      return static_cast<uint16_t>(sign | (rebased + 0xfff + ((rebased >> 13) & 1)) >> 13);
    }
    // Subnormal, in units of 2^-24: that is what an F32 between 0.5 and 1 is counted in, so that the sum is rounded.
    constexpr float kHalf = 0.5f;
    const float sum = std::bit_cast<float>(magnitude) + kHalf;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(sum) - std::bit_cast<uint32_t>(kHalf)));
  }
  TENSORD_AVX2 static __m256 widen_8(const std::byte* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  template <bool kStreamed>
  TENSORD_AVX2 static void narrow_8(__m256 floats, std::byte* to) {
    store_128<kStreamed>(to, _mm256_cvtps_ph(floats, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

struct Bf16 {
  using Element = uint16_t;
  static float widen(uint16_t value) {
    const uint32_t bits = uint32_t{value} << 16;
    return std::bit_cast<float>((bits & ~kSign) > kInfinity ? bits | kQuiet : bits);
  }
  static uint16_t narrow(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    if ((bits & ~kSign) > kInfinity) return static_cast<uint16_t>((bits | kQuiet) >> 16);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  TENSORD_AVX2 static __m256 widen_8(const std::byte* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
    const __m256i is_nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(kInfinity));
    return _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_and_si256(is_nan, _mm256_set1_epi32(kQuiet))));
  }
  template <bool kStreamed>
  TENSORD_AVX2 static void narrow_8(__m256 floats, std::byte* to) {
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

struct F32 {
  using Element = float;
  static float widen(float value) { return value; }
  static float narrow(float value) { return value; }
  TENSORD_AVX2 static __m256 widen_8(const std::byte* from) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  }
  template <bool kStreamed>
  TENSORD_AVX2 static void narrow_8(__m256 floats, std::byte* to) {
    store_256<kStreamed>(to, _mm256_castps_si256(floats));
  }
};

// Eight elements of a type that has no instructions of its own.
template <typename From>
TENSORD_AVX2 __m256 widen_one_by_one(const std::byte* from) {
  const auto at = [from](size_t index) {
    return From::widen(load<typename From::Element>(from + index * sizeof(typename From::Element)));
  };
  return _mm256_setr_ps(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
}

template <int kExponentBits, int kMantissaBits, bool kHasInfinity>
struct F8 {
  using Element = uint8_t;
  static float widen(uint8_t value) { return kTable[value]; }
  TENSORD_AVX2 static __m256 widen_8(const std::byte* from) { return widen_one_by_one<F8>(from); }

 private:
  static constexpr std::array<float, 256> kTable = [] {
    std::array<float, 256> table{};
    for (uint32_t value = 0; value < 256; ++value)
      table[value] = widen_bits(value, kExponentBits, kMantissaBits, kHasInfinity);
    return table;
  }();
};

// To the nearest F32, as F32 itself wants it.
struct F64Nearest {
  using Element = double;
  static float widen(double value) { return static_cast<float>(value); }
  TENSORD_AVX2 static __m256 widen_8(const std::byte* from) {
    const auto* const place = reinterpret_cast<const double*>(from);
    return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(place + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(place)));
  }
};

// Rounds to odd: the result keeps telling on which side of a tie of a narrower type the value was, so that rounding it
// again to F16 or BF16 gives what rounding the F64 at once would have (Boldo and Melquiond, "Emulation of a FMA and
// correctly rounded sums", 2008).
struct F64 {
  using Element = double;
  static float widen(double value) {
    const float nearest = static_cast<float>(value);
    const auto bits = std::bit_cast<uint32_t>(nearest);
    if (std::isnan(value) || static_cast<double>(nearest) == value || (bits & 1)) return nearest;
    return std::bit_cast<float>(std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? bits - 1 : bits + 1);
  }
  static double narrow(float value) { return value; }
  TENSORD_AVX2 static __m256 widen_8(const std::byte* from) { return widen_one_by_one<F64>(from); }
  template <bool kStreamed>
  TENSORD_AVX2 static void narrow_8(__m256 floats, std::byte* to) {
    store_256<kStreamed>(to, _mm256_castpd_si256(_mm256_cvtps_pd(_mm256_castps256_ps128(floats))));
    store_256<kStreamed>(to + 32, _mm256_castpd_si256(_mm256_cvtps_pd(_mm256_extractf128_ps(floats, 1))));
  }
};

// --- many elements, each through F32 ---------------------------------------------------------------------------------

// Whole groups of 8; returns how many elements that were.
template <typename From, typename To, bool kStreamed>
TENSORD_AVX2 uint64_t cast_by_8(const std::byte* source, std::byte* target, uint64_t count) {
  uint64_t at = 0;
  for (; at + 8 <= count; at += 8) {
    To::template narrow_8<kStreamed>(From::widen_8(source + at * sizeof(typename From::Element)),
                                     target + at * sizeof(typename To::Element));
  }
  return at;
}

using Cast = void(const std::byte* source, std::byte* target, uint64_t count, CastPath path);

template <typename From, typename To>
void cast(const std::byte* source, std::byte* target, uint64_t count, CastPath path) {
  using Source = typename From::Element;
  using Target = typename To::Element;
  uint64_t at = 0;
  if (path != CastPath::portable && has_avx2()) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(target) % (8 * sizeof(Target)) == 0;
    at = path == CastPath::streamed && is_aligned ? cast_by_8<From, To, true>(source, target, count)
                                                  : cast_by_8<From, To, false>(source, target, count);
  }
  for (; at < count; ++at) {
    store(target + at * sizeof(Target), To::narrow(From::widen(load<Source>(source + at * sizeof(Source)))));
  }
}

template <typename From>
Cast* cast_from(Dtype target) {
  switch (target) {
    case Dtype::f16:
      return cast<From, F16>;
    case Dtype::bf16:
      return cast<From, Bf16>;
    case Dtype::f32:
      return cast<From, F32>;
    default:
      return cast<From, F64>;
  }
}

Cast* cast_between(Dtype source, Dtype target) {
  switch (source) {
    case Dtype::f8_e4m3:
      return cast_from<F8<4, 3, false>>(target);
    case Dtype::f8_e5m2:
      return cast_from<F8<5, 2, true>>(target);
    case Dtype::f16:
      return cast_from<F16>(target);
    case Dtype::bf16:
      return cast_from<Bf16>(target);
    case Dtype::f32:
      return cast_from<F32>(target);
    default:
      return target == Dtype::f32 ? cast<F64Nearest, F32> : cast_from<F64>(target);
  }
}

}  // namespace

void cast_elements(Dtype source_dtype, const std::byte* source, Dtype target_dtype, std::byte* target, uint64_t count,
                   CastPath path) {
  CHECK(tensor::can_cast(source_dtype, target_dtype));
  if (source_dtype == target_dtype) {
    std::memcpy(target, source, count * *tensor::dtype_bytes(source_dtype));
    return;
  }
  cast_between(source_dtype, target_dtype)(source, target, count, path);
}

}  // namespace tensord::memory
