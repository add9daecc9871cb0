#include "tensor/plan.h"

#include <algorithm>

#include "tensor/nest.h"

namespace tensord::tensor {

bool Copy2D::is_empty() const {
  return row_bytes == 0 || row_count == 0 ||
         std::any_of(outer.begin(), outer.begin() + outer_count, [](const Repeat& loop) { return loop.count == 0; });
}

uint64_t Copy2D::outer_iterations() const {
  uint64_t count = 1;
  for (size_t at = 0; at < outer_count; ++at) count *= outer[at].count;
  return count;
}

Copy2D::Place Copy2D::place(uint64_t iteration) const {
  Place place{source_offset, target_offset};
  for (size_t at = 0; at < outer_count; ++at) {
    const uint64_t step = iteration % outer[at].count;
    place.source_offset += step * static_cast<uint64_t>(outer[at].source_pitch);  // negative ones wrap, and back
    place.target_offset += step * static_cast<uint64_t>(outer[at].target_pitch);
    iteration /= outer[at].count;
  }
  return place;
}

uint64_t Copy2D::cast_bytes(uint64_t source_bytes) const {
  if (!casts()) return source_bytes;
  return source_bytes / dtype_bytes(source_dtype).value_or(1) * dtype_bytes(target_dtype).value_or(1);
}

uint64_t Copy2D::target_bytes() const { return target_row_bytes() * row_count * outer_iterations(); }

bool Copy2D::is_transposed() const {
  return row_bytes <= kTileRowBytes && outer_count > 0 && outer[0].source_pitch != 0 &&
         magnitude(outer[0].source_pitch) < magnitude(source_pitch);
}

uint64_t CopyPlan::target_bytes() const {
  uint64_t bytes = 0;
  for (const Copy2D& record : records) bytes += record.target_bytes();
  return bytes;
}

bool can_cast(Dtype source, Dtype target) {
  const auto is_float = [](Dtype dtype) {
    return dtype == Dtype::f16 || dtype == Dtype::bf16 || dtype == Dtype::f32 || dtype == Dtype::f64;
  };
  return is_float(target) && (is_float(source) || source == Dtype::f8_e4m3 || source == Dtype::f8_e5m2);
}

// --- tasks ---------------------------------------------------------------------------------------------------------

void TaskCutter::open_record() {
  // Parts of a cast row must hold whole elements; 8 bytes are whole for every type.
  constexpr uint64_t kByteStep = 8;
  const Copy2D& record = plan_.records[record_];
  const uint64_t row_bytes = record.row_bytes;
  const uint64_t outers = record.outer_iterations();
  const uint64_t rows_per_task = std::max<uint64_t>(task_bytes_ / row_bytes, 1);
  if (record.row_count <= rows_per_task) {
    step_ = {std::min(outers, std::max<uint64_t>(rows_per_task / record.row_count, 1)), record.row_count, row_bytes};
  } else if (record.is_transposed()) {
    // Tiles need many iterations of outer[0] beside as many rows: tasks are about square.
    uint64_t side = 1;
    while (side * side < rows_per_task) side *= 2;
    const uint64_t outer_step = std::min(record.outer[0].count, side);
    step_ = {outer_step, std::min(record.row_count, std::max<uint64_t>(rows_per_task / outer_step, 1)), row_bytes};
  } else {
    step_ = {1, rows_per_task, row_bytes};
  }
  if (row_bytes > task_bytes_) step_ = {1, 1, std::max(task_bytes_ / kByteStep, uint64_t{1}) * kByteStep};
}

std::optional<Task> TaskCutter::next() {
  while (record_ < plan_.records.size() && step_.rows == 0) {
    if (plan_.records[record_].is_empty()) {
      ++record_;
    } else {
      open_record();
    }
  }
  if (record_ == plan_.records.size()) return std::nullopt;
  const Copy2D& record = plan_.records[record_];
  const uint64_t outers = record.outer_iterations();
  Task task{record_, outer_, 0, row_, 0, byte_, 0};
  task.outer_count = std::min(step_.outers, outers - outer_);
  task.row_count = std::min(step_.rows, record.row_count - row_);
  task.byte_count = std::min(step_.bytes, record.row_bytes - byte_);
  byte_ += task.byte_count;
  if (byte_ < record.row_bytes) return task;
  byte_ = 0;
  row_ += task.row_count;
  if (row_ < record.row_count) return task;
  row_ = 0;
  outer_ += task.outer_count;
  if (outer_ < outers) return task;
  outer_ = 0;
  ++record_;
  step_ = {};
  return task;
}

Extent source_extent(const Copy2D& record, const Task& task) {
  // The corners of the box: exact where outer iterations do not carry into outer[1], else what all of outer[0] reads.
  Nest nest(record);
  nest.loop_count = 0;
  nest.head.source_offset += static_cast<uint64_t>(record.source_pitch) * task.row_begin + task.byte_begin;
  nest.head.row_bytes = task.byte_count;
  nest.add({task.row_count, record.source_pitch, 0});
  uint64_t first = task.outer_begin;
  uint64_t last = task.outer_begin + task.outer_count - 1;
  for (size_t at = 0; at < record.outer_count; ++at) {
    const Repeat& loop = record.outer[at];
    const bool carries = first / loop.count != last / loop.count;
    const uint64_t low = carries ? 0 : first % loop.count;
    const uint64_t high = carries ? loop.count - 1 : last % loop.count;
    nest.head.source_offset += static_cast<uint64_t>(loop.source_pitch) * low;
    nest.add({high - low + 1, loop.source_pitch, 0});
    first /= loop.count;
    last /= loop.count;
  }
  return source_reach(nest).value_or(Extent{});
}

}  // namespace tensord::tensor
