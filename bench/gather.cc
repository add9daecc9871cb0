#include "bench/gather.h"

#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/text.h"
#include "bench/checkpoint.h"

namespace tensord::bench {

namespace {

constexpr uint64_t kElementBytes = 2;
constexpr uint64_t kPieceBytes = base::kMiB;

void copy_memcpy(const Rows& rows) {
  for (uint64_t row = 0; row < rows.row_count; ++row) {
    std::memcpy(rows.target + row * rows.target_pitch, rows.source + row * rows.source_pitch, rows.row_bytes);
  }
}

__attribute__((target("avx2"))) void stream_avx2(const Rows& rows) {
  const uint64_t wide_bytes = rows.row_bytes & ~uint64_t{63};
  if ((reinterpret_cast<uint64_t>(rows.target) | rows.target_pitch) % 64 != 0) return copy_memcpy(rows);
  for (uint64_t row = 0; row < rows.row_count; ++row) {
    const std::byte* source = rows.source + row * rows.source_pitch;
    std::byte* target = rows.target + row * rows.target_pitch;
    for (uint64_t at = 0; at < wide_bytes; at += 64) {
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + at));
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + at + 32));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + at), low);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + at + 32), high);
    }
    std::memcpy(target + wide_bytes, source + wide_bytes, rows.row_bytes - wide_bytes);
  }
  _mm_sfence();
}

// With 64-byte registers; `kStream`: past the caches, where the target's alignment allows.
template <bool kStream>
__attribute__((target("avx512f"))) void copy_wide(const Rows& rows) {
  const uint64_t wide_bytes = rows.row_bytes & ~uint64_t{63};
  if (kStream && (reinterpret_cast<uint64_t>(rows.target) | rows.target_pitch) % 64 != 0) return copy_memcpy(rows);
  for (uint64_t row = 0; row < rows.row_count; ++row) {
    const std::byte* source = rows.source + row * rows.source_pitch;
    std::byte* target = rows.target + row * rows.target_pitch;
    for (uint64_t at = 0; at < wide_bytes; at += 64) {
      if (kStream) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at), _mm512_loadu_si512(source + at));
      } else {
        _mm512_storeu_si512(target + at, _mm512_loadu_si512(source + at));
      }
    }
    std::memcpy(target + wide_bytes, source + wide_bytes, rows.row_bytes - wide_bytes);
  }
  _mm_sfence();
  _mm256_zeroupper();
}

constexpr const char* kLoopNames[] = {"memcpy", "AVX2 streaming", "AVX-512", "AVX-512 streaming"};
constexpr void (*kLoops[])(const Rows& rows) = {copy_memcpy, stream_avx2, copy_wide<false>, copy_wide<true>};

// Which dimension tensor parallelism cuts; nullopt: every rank has the whole tensor.
std::optional<size_t> cut_dimension(const std::string& name) {
  for (const char* rows : {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"}) {
    if (name.find(rows) != name.npos) return 0;
  }
  for (const char* columns : {"o_proj", "down_proj"}) {
    if (name.find(columns) != name.npos) return 1;
  }
  return std::nullopt;
}

}  // namespace

std::vector<Slice> rank_slices(std::span<const TensorShape> tensors, uint64_t rank_count, uint64_t rank, Part part) {
  std::vector<Slice> slices;
  for (const TensorShape& tensor : tensors) {
    const auto dimension = cut_dimension(tensor.name);
    if (part == Part::columns && dimension != 1) continue;
    Slice slice{tensor.name, 0, tensor.shape.size() == 2 ? tensor.shape[0] : 1, 0, tensor.shape.back()};
    if (dimension == 0) {
      slice.row_count /= rank_count;
      slice.row_begin = rank * slice.row_count;
    }
    if (dimension == 1) {
      slice.column_count /= rank_count;
      slice.column_begin = rank * slice.column_count;
    }
    slices.push_back(std::move(slice));
  }
  return slices;
}

uint64_t packed_bytes(std::span<const Slice> slices) {
  uint64_t bytes = 0;
  for (const Slice& slice : slices) bytes += slice.row_count * slice.column_count * kElementBytes;
  return bytes;
}

void cut_rows(const Rows& rows, std::vector<Rows>& pieces) {
  const uint64_t rows_each = std::max<uint64_t>(1, kPieceBytes / rows.row_bytes);
  for (uint64_t row = 0; row < rows.row_count; row += rows_each) {
    for (uint64_t byte = 0; byte < rows.row_bytes; byte += kPieceBytes) {  // a row that is larger is cut
      Rows piece = rows;
      piece.source += row * rows.source_pitch + byte;
      piece.target += row * rows.target_pitch + byte;
      piece.row_count = std::min(rows_each, rows.row_count - row);
      piece.row_bytes = std::min(kPieceBytes, rows.row_bytes - byte);
      pieces.push_back(piece);
    }
  }
}

std::span<const char* const> row_loops() {
  return std::span(kLoopNames).first(__builtin_cpu_supports("avx512f") ? 4 : __builtin_cpu_supports("avx2") ? 2 : 1);
}

Sample run_row_loop(std::span<const Rows> pieces, size_t loop, int thread_count) {
  std::atomic<size_t> next{0};
  return run_on_threads(thread_count, [&] {
    for (size_t at; (at = next.fetch_add(1)) < pieces.size();) kLoops[loop](pieces[at]);
  });
}

void stream(std::byte* target, const std::byte* source, uint64_t size_bytes) {
  kLoops[row_loops().size() - 1]({source, target, size_bytes, 1, size_bytes, size_bytes});
}

Result<memory::Mapped> make_memory(uint64_t size_bytes) {
  void* data = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return tl::unexpected(base::errno_error("map memory for copies", errno));
  std::memset(data, 1, size_bytes);
  return memory::Mapped(static_cast<std::byte*>(data), size_bytes);
}

void touch(const std::byte* data, uint64_t size_bytes) {
  for (uint64_t at = 0; at < size_bytes; at += 4096)
    static_cast<void>(*static_cast<const volatile std::byte*>(data + at));
}

tensord_copy CopyOrder::raw() const {
  return {.name = tensor->name.c_str(),
          .items = items.data(),
          .item_count = items.size(),
          .target = target,
          .target_dtype = static_cast<uint32_t>(dtype),
          .target_rank = static_cast<uint32_t>(shape.size()),
          .target_shape = shape.data(),
          .target_strides = strides.empty() ? nullptr : strides.data()};
}

tensord_index_item range(uint64_t begin, uint64_t count) {
  return {TENSORD_SLICE, TENSORD_HAS_START | TENSORD_HAS_STOP, static_cast<int64_t>(begin),
          static_cast<int64_t>(begin + count), 0};
}

Result<Gather> Gather::make(std::shared_ptr<client::Model> model, const std::vector<Slice>& slices,
                            memory::Mapped own_target) {
  Gather gather;
  const bool may_touch = own_target.data() == nullptr;
  if (may_touch) {
    TRY_ASSIGN(own_target, make_memory(packed_bytes(slices)));
  }
  gather.target_ = std::move(own_target);
  std::byte* target = gather.target_.data();
  for (const Slice& slice : slices) {
    TRY_ASSIGN(const tensor::Tensor* tensor, model->find(slice.name));
    const bool is_matrix = tensor->shape.size() == 2;
    const uint64_t pitch = tensor->shape.back() * kElementBytes;
    Rows rows{.source = model->data(*tensor) + slice.row_begin * pitch + slice.column_begin * kElementBytes,
              .target = target,
              .row_bytes = slice.column_count * kElementBytes,
              .row_count = slice.row_count,
              .source_pitch = pitch,
              .target_pitch = slice.column_count * kElementBytes};
    CopyOrder order{.tensor = tensor, .target = target};
    if (is_matrix) {
      order.items.push_back(range(slice.row_begin, slice.row_count));
      order.shape.push_back(slice.row_count);
    }
    order.items.push_back(range(slice.column_begin, slice.column_count));
    order.shape.push_back(slice.column_count);
    gather.orders_.push_back(std::move(order));
    target += rows.bytes();
    if (rows.source_pitch == rows.row_bytes) {  // contiguous: one long row
      rows = {rows.source, rows.target, rows.bytes(), 1, rows.bytes(), rows.bytes()};
    }
    gather.rows_.push_back(rows);
    cut_rows(rows, gather.pieces_);
    for (uint64_t row = 0; may_touch && row < rows.row_count; ++row)
      touch(rows.source + row * rows.source_pitch, rows.row_bytes);
  }
  for (const CopyOrder& order : gather.orders_) gather.copies_.push_back(order.raw());
  gather.model_ = std::move(model);
  return gather;
}

Result<Sample> Gather::run_product() {
  const Stopwatch stopwatch;
  TRY_ASSIGN(last_report_, model_->load_into(copies_, {}));
  return stopwatch.read();
}

std::vector<Contender> Gather::loops() const {
  std::vector<Contender> all;
  for (size_t loop = 0; loop < row_loops().size(); ++loop) {
    all.push_back({base::text("loop of ", row_loops()[loop]), [this, loop] { return Result<Sample>(run_loop(loop)); }});
  }
  return all;
}

Sample Gather::run_loop(size_t loop) const {
  return run_row_loop(pieces_, loop, std::max(1, static_cast<int>(last_report_.copy.thread_count)));
}

Status Gather::check(const std::string& path) {
  TRY_ASSIGN(const memory::Mapped file, map_file(path));
  std::memset(target_.data(), 0xa5, target_.size_bytes());
  TRY(run_product());
  for (const Rows& rows : rows_) {
    // The file is one window of the image, so that all its tensors are shifted alike.
    const auto& tensors = model_->index().tensors;
    const tensor::Tensor& any =
        *std::find_if(tensors.begin(), tensors.end(), [](const tensor::Tensor& one) { return one.size_bytes > 0; });
    const std::byte* expected = file.data() + any.offset + (rows.source - model_->data(any));
    for (uint64_t row = 0; row < rows.row_count; ++row) {
      if (std::memcmp(rows.target + row * rows.target_pitch, expected + row * rows.source_pitch, rows.row_bytes) != 0) {
        return base::fail(base::Code::corrupt, base::text(path, ": row ", row, " of a slice differs from the file"));
      }
    }
  }
  return {};
}

Result<Figure> race_gather(const Bench& bench, Gather& gather, std::string name, const std::string& path,
                           std::span<const Contender> peers) {
  TRY(gather.check(path));
  TRY_ASSIGN(const Race raced, race(
                                   bench.options(), gather.loops(), [&] { return gather.run_product(); }, peers));
  Figure figure = race_figure(std::move(name), raced, static_cast<double>(gather.bytes()), at_least(0.90));
  figure.details["threads"] = gather.last_report().copy.thread_count;
  return figure;
}

}  // namespace tensord::bench
