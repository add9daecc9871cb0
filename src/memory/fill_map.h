// FillMap: how far a replica is filled, in memory that the daemon writes and every client reads.
//
//   memfd   [FillHeader, one page][bit per block ...]      sealed: clients can map it for reading only
//
// A client waits for bytes without asking the daemon: it looks at the bits and sleeps on a futex word in the header.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "memory/mapped.h"
#include "tensor/digest.h"

namespace tensord::memory {

enum class FillState : uint32_t { filling = 0, ready = 1, failed = 2 };

// Shared memory layout, version 1; all of it is written by the daemon.
struct FillHeader {
  static constexpr uint32_t kMagic = 0x314d4654;  // "TFM1"
  uint32_t magic;
  std::atomic<uint32_t> state;     // FillState
  std::atomic<uint32_t> sequence;  // futex word: moves with every change
  uint32_t error_code;             // base::Code; valid in state failed
  std::atomic<uint64_t> ready_bytes;
  uint64_t total_bytes;
  uint64_t block_count;
  std::byte artifact_id[16];  // valid in state ready
  char error_message[2048];   // ends with NUL; valid in state failed
};
static_assert(sizeof(FillHeader) <= 4096 && std::atomic<uint64_t>::is_always_lock_free);

// What clients see of it. Thread safe.
class FillView {
 public:
  // Maps the descriptor; checks its seals, size and header. Code::corrupt when it is no fill map.
  static Result<FillView> open(const base::Fd& fd);

  FillState state() const { return static_cast<FillState>(header().state.load(std::memory_order_acquire)); }
  uint64_t ready_bytes() const { return header().ready_bytes.load(std::memory_order_relaxed); }
  uint64_t total_bytes() const { return header().total_bytes; }
  uint64_t block_count() const { return header().block_count; }
  tensor::Digest artifact_id() const;  // of zeros until ready
  base::Error error() const;           // in state failed

  bool has_blocks(uint64_t first, uint64_t last) const;

  // Waits until blocks [first, last) are there. Returns the load's own error once it has failed, also for blocks
  // that were there before: of a file that changed nobody knows which bytes are old and which are new; Code::unavailable
  // when `timeout_ms` (-1: none) passes; and the error of `go_on`, which is asked ten times a second.
  Status wait(uint64_t first, uint64_t last, int64_t timeout_ms, const std::function<Status()>& go_on) const;

  // Waits until the whole replica is ready: also the files were found unchanged, and the artifact id is known.
  Status wait_ready(int64_t timeout_ms, const std::function<Status()>& go_on) const;

 protected:
  FillView() = default;
  FillHeader& header() const { return *reinterpret_cast<FillHeader*>(mapped_.data()); }

  Mapped mapped_;

 private:
  Status wait_until(const std::function<bool()>& reached, int64_t timeout_ms,
                    const std::function<Status()>& go_on) const;
};

// The daemon's side. Thread safe: any thread may mark blocks; one thread ends it.
class FillMap : public FillView {
 public:
  static Result<FillMap> create(uint64_t block_count, uint64_t total_bytes);

  int fd() const { return fd_.get(); }
  uint64_t size_bytes() const { return mapped_.size_bytes(); }

  // The block's bytes are written and checked: readers may look at them from now on.
  void mark_block(uint64_t block, uint64_t size_bytes);
  void end_ready(const tensor::Digest& artifact_id);
  void end_failed(const base::Error& error);  // the first end counts
  // Its memory will hold something else: whoever was left with this map alone is not to trust what it said.
  void void_it();

 private:
  FillMap() = default;
  void end(FillState state);
  void wake();

  base::Fd fd_;
};

}  // namespace tensord::memory
