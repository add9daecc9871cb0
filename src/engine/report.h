// What a load did and where its time went; what clients did with the result.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "memory/copy.h"
#include "storage/source.h"
#include "tensor/digest.h"

namespace tensord::engine {

// Spans are kept only when asked for, and no more than this many of a load (256 GiB in blocks of 1 MiB, two each).
inline constexpr size_t kSpanCountMax = 1 << 19;
inline constexpr size_t kUseCountMax = 256;  // of one load; the oldest since it was opened last stay

struct LoadSpan {
  enum class Kind : uint8_t { read, check };
  Kind kind = Kind::read;
  uint32_t thread = 0;  // the kernel's thread id
  uint64_t block = 0;
  uint64_t size_bytes = 0;
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
};

struct LoadCounters {
  uint64_t bytes = 0;
  int64_t read_ns = 0;   // of the threads' time while the load filled: what is not told below
  int64_t check_ns = 0;  // summed over threads: hashing and comparing; a sample where reading is mixed in
  int64_t touch_ns = 0;  // summed over threads: giving fresh memory its pages
};

// One load_into of one client.
struct Use {
  pid_t pid = 0;
  std::string name;
  int64_t begin_ns = 0;      // base::monotonic_ns, as the next
  int64_t map_begin_ns = 0;  // of the mapping that it copied out of
  int64_t map_ns = 0;
  int64_t plan_ns = 0;
  int64_t wait_ns = 0;
  int64_t copy_ns = 0;
  uint64_t copy_bytes = 0;
  uint64_t device_bytes = 0;  // of those: to GPU memory, by copy engines
  std::string slower_why;     // why copies to GPU memory took another way
  uint64_t record_count = 0;
  uint32_t thread_count = 0;
  std::vector<memory::CopySpan> spans;
};

// A block whose bytes are not what was loaded.
struct VerifyFault {
  std::string file;
  std::string tensor;
  uint32_t leaf = 0;
  uint64_t offset = 0;  // in the file
  uint64_t size_bytes = 0;
};
inline constexpr size_t kFaultCountMax = 100;  // told of one replica

enum class ReplicaState : uint8_t { indexing, waiting, filling, ready, failed };

struct LoadReport {
  uint64_t load = 0;  // 0: it only waits so far
  uint64_t replica = 0;
  std::string path;
  std::vector<std::string> only;  // what was asked for; empty: all tensors
  uint64_t tensor_count = 0;
  uint64_t whole_tensor_count = 0;             // of the files
  ReplicaState state = ReplicaState::filling;  // waiting: also for headers
  std::optional<tensor::Digest> artifact;
  std::optional<base::Error> error;
  int64_t begin_ns = 0;
  int64_t fill_ns = 0;      // when reading began; 0: it has not come to that
  int64_t reopened_ns = 0;  // when somebody last found the replica resident
  int64_t wall_ns = 0;      // from the request to the last checked block; so far, while it fills
  int64_t index_ns = 0;
  int64_t memory_ns = 0;  // waiting in line, and until what had to go for it has left memory
  LoadCounters counters;
  int64_t cpu_ns = 0;       // that the whole daemon ran meanwhile
  uint64_t disk_bytes = 0;  // what devices delivered meanwhile, to the whole daemon
  storage::SourceCounters source;
  std::string read_path;           // how what was not cached was read: "io_uring, O_DIRECT"
  std::vector<std::string> notes;  // each choice and fallback of this load, with its reason
  uint32_t thread_count = 0;
  bool checked_against_record = false;  // else the digests of this load became the record
  std::vector<LoadSpan> spans;
  std::vector<Use> uses;
};

}  // namespace tensord::engine
