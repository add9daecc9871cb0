// Source: something the bytes of an artifact's files can be read from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/fd.h"
#include "base/result.h"

namespace tensord::storage {

using base::Result;
using base::Status;

struct SourceFile {
  base::Fd fd;                  // open for reading; a regular file
  std::string path;             // for messages
  base::FileIdentity identity;  // reads end at its size, also when the file grew since
};

// When the bytes moved, without the time a read waited for its turn; both 0 when it never began.
struct ReadTiming {
  int64_t begin_ns = 0;  // base::monotonic_ns
  int64_t end_ns = 0;
};

// `done` is called exactly once, on any thread (also from within read(), cancel() and the destructor), when
// `target` is full or will not be; nothing is written to `target` from then on. It may call read(), never
// destroy the source. Errors name file and offset; Code::corrupt when the file ends early, Code::cancelled
// after cancel(). After an error the target holds anything. An empty target is full at once.
//
// `begin`, when set, is called before the first byte is written. `piece`, when set, is called with the target's bytes,
// each once and in order, while they are hot in a cache and before the target must hold them: `at` is their place in it.
// By the next `piece` it does, for other threads after base::end_streaming(), and by `done`. All three are called on one
// thread at a time. A failed read may have handed out pieces.
struct ReadRequest {
  uint32_t file = 0;
  uint64_t offset = 0;  // in the file
  std::span<std::byte> target;
  std::function<void(Status, ReadTiming)> done;
  std::function<void()> begin = {};
  std::function<void(uint64_t at, std::span<const std::byte> bytes)> piece = {};
};

// How the bytes came, for explain. The first two count reads that filled their target, the others every byte.
struct SourceCounters {
  uint64_t read_count = 0;
  uint64_t read_bytes = 0;
  uint64_t cached_bytes = 0;    // were in the page cache
  uint64_t direct_bytes = 0;    // past the page cache
  uint64_t buffered_bytes = 0;  // from the disk through the page cache
};

// Thread safe. One contract test (source_contract_test.cc) holds for every implementation.
class Source {
 public:
  // Cancels, then waits until every `done` has returned.
  virtual ~Source() = default;

  // Starts a read; does not wait for it. `request.target` must stay until `done` is called. The caller bounds
  // how many are in flight.
  virtual void read(ReadRequest request) = 0;

  // Reads that have not begun end with Code::cancelled before it returns; those begun may still succeed.
  // Later reads are refused with the same code.
  virtual void cancel() = 0;

  // Code::changed when the file is not what it was when the source was made.
  virtual Status check_unchanged(uint32_t file) = 0;

  virtual SourceCounters counters() const = 0;

  // How bytes that are in no cache are read: "io_uring, O_DIRECT".
  virtual std::string read_path() const = 0;
  // Each choice and fallback so far with its reason, one line each.
  virtual std::vector<std::string> notes() const = 0;
};

}  // namespace tensord::storage
