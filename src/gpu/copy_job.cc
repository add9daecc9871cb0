#include "gpu/copy_job.h"

#include <algorithm>
#include <numeric>

namespace tensord::gpu {

using base::Code;
using base::fail;

namespace {

// Whether rows lie within `size_bytes`. No sum can overflow: offsets and pitches are below 2^64, counts too.
bool fits(uint64_t offset, uint64_t pitch, const DeviceCopy& copy, uint64_t size_bytes) {
  const auto rows = static_cast<unsigned __int128>(copy.row_count - 1) * pitch;
  return rows <= size_bytes && copy.row_bytes <= size_bytes && offset <= size_bytes &&
         offset + rows + copy.row_bytes <= size_bytes;
}

bool can_run(const DeviceCopy& copy) {
  if (copy.row_bytes == 0 || copy.row_count == 0) return false;
  if (copy.row_count == 1) return true;
  const auto [narrow, wide] = std::minmax(copy.source_pitch, copy.target_pitch);
  return narrow >= copy.row_bytes && wide <= kPitchMax;
}

}  // namespace

Status check(const CopyJob& job) {
  for (size_t at = 0; at < job.copies.size(); ++at) {
    const DeviceCopy& copy = job.copies[at];
    if (copy.target >= job.targets.size() || !can_run(copy) ||
        !fits(copy.source_offset, copy.source_pitch, copy, job.image_bytes) ||
        !fits(copy.target_offset, copy.target_pitch, copy, job.targets[copy.target].size_bytes)) {
      return fail(Code::invalid_argument, "copy ", at, " of ", job.copies.size(), " to a GPU, ", copy.row_count,
                  " rows x ", copy.row_bytes, " B from ", copy.source_offset, " to ", copy.target_offset, " of target ",
                  copy.target, ", reaches out of its memory");
    }
  }
  for (const Target& target : job.targets) {
    const auto add = [](uint64_t sum, const auto& one) { return sum + std::min(one.second, UINT64_MAX - sum); };
    const uint64_t allocated = std::accumulate(target.allocations.begin(), target.allocations.end(), uint64_t{0}, add);
    if (!target.ipc && allocated < target.size_bytes)
      return fail(Code::invalid_argument, "a target on a GPU is larger than the memory that came with it");
  }
  return {};
}

std::optional<Piece> PieceCutter::next() {
  if (copy_ == job_.copies.size()) return std::nullopt;
  const DeviceCopy& copy = job_.copies[copy_];
  Piece piece{.target = copy.target, .source_pitch = copy.source_pitch, .target_pitch = copy.target_pitch};
  piece.image_offset = copy.source_offset + row_ * copy.source_pitch + byte_;
  piece.target_offset = copy.target_offset + row_ * copy.target_pitch + byte_;
  if (piece.image_offset < segment_begin_) segment_ = 0, segment_begin_ = 0;
  while (piece.image_offset - segment_begin_ >= job_.source[segment_].size_bytes)
    segment_begin_ += job_.source[segment_++].size_bytes;
  piece.segment = segment_;
  piece.segment_offset = piece.image_offset - segment_begin_;
  const uint64_t space = std::min(part_bytes_ - piece.segment_offset % part_bytes_,
                                  job_.source[segment_].size_bytes - piece.segment_offset);
  const uint64_t row_left = copy.row_bytes - byte_;
  if (byte_ > 0 || row_left > std::min(space, piece_bytes_)) {
    piece.row_bytes = std::min({row_left, space, piece_bytes_});
    byte_ += piece.row_bytes;
    if (byte_ == copy.row_bytes) ++row_, byte_ = 0;
  } else {
    piece.row_bytes = copy.row_bytes;
    piece.row_count = std::min(copy.row_count - row_, piece_bytes_ / copy.row_bytes);
    if (copy.row_count > 1)
      piece.row_count = std::min(piece.row_count, 1 + (space - copy.row_bytes) / copy.source_pitch);
    row_ += piece.row_count;
  }
  if (row_ == copy.row_count) ++copy_, row_ = 0;
  if (piece.row_count > 1 && copy.source_pitch == copy.row_bytes && copy.target_pitch == copy.row_bytes)
    piece.row_bytes *= std::exchange(piece.row_count, 1);
  return piece;
}

}  // namespace tensord::gpu
