// A CopyJob: strided copies out of one replica into device memory of one client, and its cutting into pieces for a copy
// engine.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/fd.h"
#include "gpu/driver.h"
#include "memory/segment_pool.h"

namespace tensord::gpu {

// Payload of one piece at most: single calls move 53 GB/s at 4 MiB and 55 at 16 MiB (H200, PCIe 5).
inline constexpr uint64_t kPieceBytes = 16 << 20;
// Between devices, whose links are several times as fast: 16 MiB move 236 GB/s over NVLink, whole tensors 388 (H100).
inline constexpr uint64_t kPeerPieceBytes = 512 << 20;
// Longer pitches are none for the driver.
inline constexpr uint64_t kPitchMax = (uint64_t{1} << 31) - 1;
// Shorter rows are slower than copying whole tensors and taking them apart on the device: 11 GB/s at 16 B.
inline constexpr uint64_t kRowBytesMin = 16;

// One stretch of a client's device memory: one allocation that it exported as a whole, or several whose descriptors came
// with the request and that follow each other.
struct Target {
  uint64_t size_bytes = 0;
  std::optional<IpcHandle> ipc;
  std::vector<std::pair<base::Fd, uint64_t>> allocations;  // and their sizes
};

// Rows out of the replica's image to rows of a target.
struct DeviceCopy {
  uint64_t source_offset = 0;
  uint64_t target_offset = 0;
  uint64_t row_bytes = 0;
  uint64_t row_count = 1;
  uint64_t source_pitch = 0;  // of rows, where there are several
  uint64_t target_pitch = 0;
  uint32_t target = 0;
};

// One segment of an image, as the owner of the replica knows it.
struct HostSegment {
  std::byte* data = nullptr;
  uint64_t size_bytes = 0;
  std::shared_ptr<memory::AttachmentSlot> slot;
};

struct DeviceReport {
  uint64_t bytes = 0;
  uint64_t call_count = 0;  // of the driver's
  int64_t begin_ns = 0;
  int64_t prepare_ns = 0;  // opening targets, registering host memory
  int64_t wait_ns = 0;     // for bytes that were not there yet, with nothing else to do
  int64_t end_ns = 0;
};

struct CopyJob {
  uint64_t client = 0;  // Device::forget() ends its jobs
  uint64_t number = 0;  // of the client's request
  uint64_t image_bytes = 0;
  std::vector<HostSegment> source;  // of the image, one after another; they stay until `done` is called
  std::optional<Target>
      device_source;  // instead of the segments' memory: the image on this device or one that it reaches
  std::vector<Target> targets;
  std::vector<DeviceCopy> copies;  // best in the order of the image
  // Whether bytes [begin, end) of the image are there; the error of a load that failed. Thread safe.
  std::function<Result<bool>(uint64_t begin, uint64_t end)> ready;
  // All copies whose sources end at or before `image_end` are done; from the device's thread. May be empty.
  std::function<void(uint64_t image_end)> copied;
  // Bytes that the job has waited for in vain for a while.
  std::function<void(uint64_t begin, uint64_t end)> want;
  // Called once, on the device's thread, when nothing of the job is in flight any more.
  std::function<void(Result<DeviceReport>)> done;
};

// Code::invalid_argument where a copy reads or writes out of bounds, or is none that a copy engine can do; says which.
Status check(const CopyJob& job);

// Rows [0, row_count) of row_bytes within one part of one segment; contiguous on both sides when row_count is 1.
struct Piece {
  uint32_t segment = 0;
  uint64_t segment_offset = 0;
  uint64_t image_offset = 0;
  uint32_t target = 0;
  uint64_t target_offset = 0;
  uint64_t row_bytes = 0;
  uint64_t row_count = 1;
  uint64_t source_pitch = 0;
  uint64_t target_pitch = 0;
  uint64_t bytes() const { return row_bytes * row_count; }
  uint64_t image_end() const { return image_offset + (row_count - 1) * source_pitch + row_bytes; }
};

// Cuts the copies of a checked job, in their order. The job must outlive it.
class PieceCutter {
 public:
  explicit PieceCutter(const CopyJob& job, uint64_t part_bytes)
      : job_(job),
        part_bytes_(job.device_source ? UINT64_MAX : part_bytes),
        piece_bytes_(job.device_source ? kPeerPieceBytes : kPieceBytes) {}
  std::optional<Piece> next();

 private:
  const CopyJob& job_;
  const uint64_t part_bytes_;  // no piece spans two parts of a host segment
  const uint64_t piece_bytes_;
  size_t copy_ = 0;
  uint64_t row_ = 0, byte_ = 0;
  uint32_t segment_ = 0;  // the one that was read last, and where it begins in the image
  uint64_t segment_begin_ = 0;
};

}  // namespace tensord::gpu
