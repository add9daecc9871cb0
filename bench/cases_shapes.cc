// shapes: 3-D slices, transposes and casts into own memory, against loops written by hand.
#include <immintrin.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cstring>

#include "base/text.h"
#include "bench/checkpoint.h"
#include "bench/gather.h"
#include "bench/processes.h"

namespace tensord::bench {

namespace {

using base::text;

// BF16 as the file has it.
struct Shape {
  uint64_t planes, rows, columns;
};

// `work(number)` for all numbers below `count`, on all cores.
Sample for_each(uint64_t count, const std::function<void(uint64_t number)>& work) {
  std::atomic<uint64_t> next{0};
  return run_on_threads(static_cast<int>(::sysconf(_SC_NPROCESSORS_ONLN)), [&] {
    for (uint64_t at; (at = next.fetch_add(1)) < count;) work(at);
  });
}

// ---- loops -------------------------------------------------------------------------------------------------

// 8 x 8 elements by registers: row r of the source becomes column r of the target.
void transpose_8x8(const uint16_t* source, uint64_t source_pitch, uint16_t* target, uint64_t target_pitch) {
  __m128i a[8], b[8];
  for (int row = 0; row < 8; ++row)
    a[row] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + static_cast<uint64_t>(row) * source_pitch));
  for (int step = 0; step < 3; ++step) {  // each step interleaves row i with row i + 4; after three, columns are rows
    for (int row = 0; row < 4; ++row) {
      b[2 * row] = _mm_unpacklo_epi16(a[row], a[row + 4]);
      b[2 * row + 1] = _mm_unpackhi_epi16(a[row], a[row + 4]);
    }
    std::memcpy(a, b, sizeof(a));
  }
  for (int row = 0; row < 8; ++row)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + static_cast<uint64_t>(row) * target_pitch), a[row]);
}

// Tiles of 32 target rows by all source rows of a stripe: a whole cache line of the target is written at a time.
Sample transpose(const uint16_t* source, uint16_t* target, uint64_t rows, uint64_t columns, uint64_t tile) {
  const uint64_t across = columns / tile;
  return for_each(rows / tile * across, [&](uint64_t number) {
    const uint64_t row = number / across * tile, column = number % across * tile;
    for (uint64_t c = column; c < column + tile; c += 8) {
      for (uint64_t r = row; r < row + tile; r += 8)
        transpose_8x8(source + r * columns + c, columns, target + c * rows + r, rows);
    }
  });
}

constexpr uint64_t kCastPiece = 256 * 1024;  // elements

enum class Store { plain, stream };

// Eight elements as F32.
__attribute__((target("avx2"))) inline __m256i widened(const uint16_t* source) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return _mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16);
}

template <Store kStore>
__attribute__((target("avx2"))) void widen(const uint16_t* source, float* target, uint64_t count) {
  for (uint64_t at = 0; at < count; at += 8) {
    auto* const to = reinterpret_cast<__m256i*>(target + at);
    if (kStore == Store::stream) {
      _mm256_stream_si256(to, widened(source + at));
    } else {
      _mm256_storeu_si256(to, widened(source + at));
    }
  }
  _mm_sfence();
}

template <Store kStore>
__attribute__((target("avx2,f16c"))) void halve(const uint16_t* source, uint16_t* target, uint64_t count) {
  for (uint64_t at = 0; at < count; at += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_castsi256_ps(widened(source + at)), _MM_FROUND_TO_NEAREST_INT);
    auto* const to = reinterpret_cast<__m128i*>(target + at);
    if (kStore == Store::stream) {
      _mm_stream_si128(to, half);
    } else {
      _mm_storeu_si128(to, half);
    }
  }
  _mm_sfence();
}

// NaN turns quiet, as a conversion does; the wide loops above leave that out, being a ceiling.
void widen_plain(const uint16_t* source, float* target, uint64_t count) {
  constexpr uint32_t kInfinity = 0x7f80, kQuiet = 0x0040;
  for (uint64_t at = 0; at < count; ++at) {
    const uint32_t bits = source[at];
    const uint32_t quiet = (bits & 0x7fff) > kInfinity ? kQuiet : 0;
    target[at] = std::bit_cast<float>((bits | quiet) << 16);
  }
}

template <typename Target, typename Cast>
Contender cast_loop(const char* name, const uint16_t* source, std::byte* target, uint64_t count, Cast cast) {
  return {name, [=]() -> Result<Sample> {
            return for_each((count + kCastPiece - 1) / kCastPiece, [&](uint64_t piece) {
              const uint64_t at = piece * kCastPiece;
              cast(source + at, reinterpret_cast<Target*>(target) + at, std::min(kCastPiece, count - at));
            });
          }};
}

// ---- races -------------------------------------------------------------------------------------------------

struct Order {
  std::string name;
  CopyOrder order;
  uint64_t target_bytes = 0,
           moved_bytes = 0;  // moved: read and written, as far as a rate is concerned the larger
};

// `ceilings` write the same target; the first of them says what its bytes must be.
Status race_order(Bench& bench, client::Model& model, const Order& order, std::span<const Contender> ceilings) {
  const tensord_copy copies[] = {order.order.raw()};
  const auto product = [&]() -> Result<Sample> {
    const Stopwatch stopwatch;
    TRY(model.load_into(copies, {.cast = 1}));
    return stopwatch.read();
  };
  TRY(ceilings.front().act());
  const std::vector<std::byte> expected(order.order.target, order.order.target + order.target_bytes);
  std::memset(order.order.target, 0xa5, order.target_bytes);
  TRY(product());
  if (std::memcmp(expected.data(), order.order.target, order.target_bytes) != 0)
    return base::fail(base::Code::corrupt, order.name + ": product and loop differ");
  TRY_ASSIGN(const Race raced, race(bench.options(), ceilings, product));
  bench.add(race_figure(order.name, raced, static_cast<double>(order.moved_bytes), at_least(0.90)));
  return {};
}

// The middle half of rows of every plane, and of `columns_part` the middle of the columns.
Status race_cube(Bench& bench, client::Model& model, const Shape& cube, uint64_t column_part, std::byte* target) {
  TRY_ASSIGN(const tensor::Tensor* tensor, model.find("cube"));
  const Shape cut{cube.planes, cube.rows / 2, cube.columns / column_part};
  const uint64_t first_row = cube.rows / 4, first_column = (cube.columns - cut.columns) / 2;
  Order order{text("3-D: [:, ", first_row, ":", first_row + cut.rows, ", ", first_column, ":",
                   first_column + cut.columns, "] of [", cube.planes, ", ", cube.rows, ", ", cube.columns, "]")};
  order.order = {.tensor = tensor,
                 .items = {range(0, cut.planes), range(first_row, cut.rows), range(first_column, cut.columns)},
                 .target = target,
                 .shape = {cut.planes, cut.rows, cut.columns}};
  order.target_bytes = order.moved_bytes = cut.planes * cut.rows * cut.columns * 2;
  std::vector<Rows> pieces;
  for (uint64_t plane = 0; plane < cut.planes; ++plane) {
    Rows rows{.source = model.data(*tensor) + ((plane * cube.rows + first_row) * cube.columns + first_column) * 2,
              .target = target + plane * cut.rows * cut.columns * 2,
              .row_bytes = cut.columns * 2,
              .row_count = cut.rows,
              .source_pitch = cube.columns * 2,
              .target_pitch = cut.columns * 2};
    if (rows.row_bytes == rows.source_pitch)
      rows = {rows.source, rows.target, rows.bytes(), 1, rows.bytes(), rows.bytes()};
    cut_rows(rows, pieces);
  }
  std::vector<Contender> loops;
  for (size_t loop = 0; loop < row_loops().size(); ++loop) {
    loops.push_back({text("loop of ", row_loops()[loop]), [&pieces, loop]() -> Result<Sample> {
                       return run_row_loop(pieces, loop, static_cast<int>(::sysconf(_SC_NPROCESSORS_ONLN)));
                     }});
  }
  return race_order(bench, model, order, loops);
}

}  // namespace

Status run_shapes(Bench& bench) {
  const Shape cube = bench.tiny() ? Shape{4, 32, 256} : Shape{64, 512, 4096};
  const uint64_t side = bench.tiny() ? 256 : 8192;
  TRY_ASSIGN(const std::string path,
             make_checkpoint(
                 bench, "shapes.safetensors",
                 std::vector<TensorShape>{{"cube", {cube.planes, cube.rows, cube.columns}}, {"square", {side, side}}}));
  TRY_ASSIGN(const Daemon daemon, Daemon::start(bench.options()));
  TRY_ASSIGN(const auto model, open_ready(path));
  touch(model->mapping()->data(), model->image_bytes());
  TRY_ASSIGN(const tensor::Tensor* square, model->find("square"));
  const uint64_t count = side * side;
  TRY_ASSIGN(const memory::Mapped memory, make_memory(std::max(count * 4, cube.planes * cube.rows * cube.columns * 2)));
  std::byte* const target = memory.data();
  for (const uint64_t column_part : {1, 2, 8}) TRY(race_cube(bench, *model, cube, column_part, target));

  const auto* const source = reinterpret_cast<const uint16_t*>(model->data(*square));
  const auto whole = [&](std::string name, tensor::Dtype dtype, std::vector<int64_t> strides, uint32_t bytes) {
    Order order{std::move(name)};
    order.order = {
        .tensor = square, .target = target, .dtype = dtype, .shape = {side, side}, .strides = std::move(strides)};
    order.target_bytes = order.moved_bytes = count * bytes;
    return order;
  };
  const auto pitch = static_cast<int64_t>(side);
  std::vector<Contender> loops;
  for (const uint64_t tile : {32, 64, 128}) {
    loops.push_back({text("8 x 8 in registers, tiles of ", tile), [=]() -> Result<Sample> {
                       return transpose(source, reinterpret_cast<uint16_t*>(target), side, side, tile);
                     }});
  }
  TRY(race_order(bench, *model,
                 whole(text("transpose of [", side, ", ", side, "]"), tensor::Dtype::bf16, {2, pitch * 2}, 2), loops));
  const bool is_wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  loops = {cast_loop<float>("plain loop", source, target, count, widen_plain)};
  if (is_wide) {
    loops.push_back(cast_loop<float>("AVX2", source, target, count, widen<Store::plain>));
    loops.push_back(cast_loop<float>("AVX2 streaming", source, target, count, widen<Store::stream>));
  }
  TRY(race_order(bench, *model, whole("cast BF16 to F32", tensor::Dtype::f32, {pitch * 4, 4}, 4), loops));
  if (!is_wide) {
    bench.skip("cast BF16 to F16", "the loop needs AVX2");
    return {};
  }
  loops = {cast_loop<uint16_t>("AVX2", source, target, count, halve<Store::plain>),
           cast_loop<uint16_t>("AVX2 streaming", source, target, count, halve<Store::stream>)};
  return race_order(bench, *model, whole("cast BF16 to F16", tensor::Dtype::f16, {pitch * 2, 2}, 2), loops);
}

}  // namespace tensord::bench
