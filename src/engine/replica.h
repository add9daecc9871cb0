// Replica: one resident copy of an artifact in host memory, possibly still filling. Owned by the engine's thread.
//
//   indexing ──► waiting ──(room)──► filling ──► ready ──► (evicted)
//       └───────────┴───────────────────┴──────► failed ──► (gone with its last lease)
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/content.h"
#include "engine/load.h"
#include "engine/report.h"
#include "memory/fill_map.h"
#include "memory/segment_pool.h"

namespace tensord::engine {

// The process that asked; what it says of itself is for people only.
struct Holder {
  pid_t process_id = 0;
  uid_t user_id = 0;
  std::string process_name;
  uint64_t asker = 0;  // by which Engine::withdraw() knows it
};

// How long a replica stays, and what its opener does where there is no room. The numbers are the protocol's.
enum class Stay : uint8_t {
  artifact,     // until its memory is needed
  lease,        // with its last lease
  batch,        // with its last lease, which ends soon: others may wait for its room, as this one for that of others
  batch_ahead,  // the same, but its opener holds a batch already: it must not wait, lest two wait for each other
};

// A client's hold: the read end of a pipe whose write end the client has. The pipe hangs up when the last process that
// holds the write end lets go.
struct Lease {
  base::Fd read_end;
  Holder holder;
  int64_t since_ns = 0;
  bool brief = false;  // of a batch
};

// Which bytes a replica holds: two requests with equal keys are for one replica.
struct ReplicaKey {
  std::vector<base::FileIdentity> files;
  std::vector<std::string> only;  // as asked for, sorted; empty: all tensors
  std::string device;             // whose memory it lies in: a UUID as text; empty: the host's
  auto operator<=>(const ReplicaKey&) const = default;
};

// Names of one replica that selectors know: links and lists of files can name it in many ways.
inline constexpr size_t kPathCountMax = 16;

// Memory of a device: descriptors of allocations that follow each other, and their sizes. It lasts as long as anybody has
// them.
using Allocations = std::vector<std::pair<base::Fd, uint64_t>>;

// What a client gets. Descriptors are borrowed and valid within the callback only, but for the lease.
struct Grant {
  uint64_t replica = 0;
  std::shared_ptr<const Content> content;
  int index_fd = -1;
  uint64_t image_bytes = 0;
  int fill_map_fd = -1;  // -1, and no segments and no lease, when only the index was asked for
  uint64_t fill_map_bytes = 0;
  std::vector<int> segment_fds;
  std::vector<uint64_t> segment_bytes;
  base::Fd lease;
  uint64_t batch_bytes = 0;       // in which clients read what does not fit
  uint64_t memory_bytes_max = 0;  // nothing larger can be loaded
};
using GrantDone = std::function<void(Result<Grant>)>;

// Somebody who asked for a replica that is being indexed or waits for room.
struct Waiter {
  bool index_only = false;
  Stay stay = Stay::artifact;
  Holder holder;
  GrantDone done;
  int64_t asked_ns = 0;
  int64_t patience_ns = 0;  // how long it waits for room
};

struct Replica {
  uint64_t number = 0;
  std::vector<std::string> paths;  // as clients named it, the first one first; at most kPathCountMax
  ReplicaKey key;
  uid_t owner = 0;
  ReplicaState state = ReplicaState::indexing;
  bool pinned = false;
  bool stays = false;      // somebody wants it beyond the leases
  bool checked = false;    // every leaf was known before
  bool doomed = false;     // evicted while it was filling: goes when the load has ended
  uint32_t use_count = 0;  // verifications and copies to devices that run
  int64_t asked_ns = 0;    // when it was opened first
  int64_t room_ns = 0;     // since when it waited for room
  int64_t last_used_ns = 0;

  std::vector<OpenFile> files;  // until the load begins
  std::vector<Waiter> waiters;  // while indexing and waiting
  std::string waits_for;        // while waiting; for people
  std::shared_ptr<const Content> content;
  base::Fd index_fd;  // the index as clients read it
  memory::SegmentRun memory;
  Allocations allocations;    // on a device, in place of segments
  uint64_t device_bytes = 0;  // of those, also before they are made
  uint64_t image_bytes = 0;   // as it is laid out where it lies
  uint64_t source = 0;        // on a device, while it fills: the replica that it is copied from, which it holds
  bool copied = false;        // and all bytes are there
  std::optional<memory::FreshPages> pages;  // while filling
  std::optional<memory::FillMap> fill;
  std::map<uint64_t, Lease> leases;
  std::vector<tensor::Digest> leaves;  // once ready
  std::optional<tensor::Digest> artifact;
  std::optional<base::Error> error;
  uint64_t load_number = 0;
  std::unique_ptr<Load> load;  // while filling; before memory and fill in destruction

  const std::string& path() const { return paths.front(); }
  void add_path(const std::string& path) {
    if (paths.size() < kPathCountMax && std::find(paths.begin(), paths.end(), path) == paths.end())
      paths.push_back(path);
  }
  uint64_t memory_bytes() const { return memory.size_bytes() + device_bytes; }
  // Nobody waits for it any more: its clients went while it was filling.
  bool abandoned() const { return state == ReplicaState::filling && leases.empty() && !pinned; }
  bool held() const { return !leases.empty() || pinned || use_count > 0 || state <= ReplicaState::waiting; }
  // Whether a process holds it for longer than a batch takes.
  bool is_held_by(pid_t process_id) const {
    return std::any_of(leases.begin(), leases.end(), [&](const auto& lease) {
      return lease.second.holder.process_id == process_id && !lease.second.brief;
    });
  }
  // The index, the fill map, the segments, and the files until they are read. Who still waits takes nobody's room.
  size_t descriptor_count() const {
    if (state <= ReplicaState::waiting) return 0;
    return 2 + memory.segments.size() + allocations.size() + (state == ReplicaState::filling ? key.files.size() : 0);
  }
};

}  // namespace tensord::engine
