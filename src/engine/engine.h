// Engine: the only mutable heart. A Load reads a Source through blocks into a Replica; a client holds a Lease on it.
//
//   open ──► known? ──► grant
//              └─► index (pool) ──► line ──► room? evict ──► segments ──► load (pool) ──► ready
//                                     └─ until somebody lets go, or patience ends
//
// Everything here runs on one thread, the owner's; work for other threads comes back through Owner::post.
#pragma once

#include <algorithm>
#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "catalog/catalog.h"
#include "engine/devices.h"
#include "engine/eviction.h"
#include "engine/replica.h"
#include "engine/report.h"
#include "memory/fresh_pages.h"
#include "memory/segment_pool.h"
#include "storage/file_source.h"
#include "storage/read_pool.h"

namespace tensord::engine {

inline constexpr size_t kLoadReportCountMax = 64;
inline constexpr size_t kLeaseCountMax = 100'000;
inline constexpr size_t kNoteCountMax = 1000;  // remembered as logged: notes name files without end
// What one reply to a client can carry, less lease, fill map and index (rpc/frame.h: 2048 descriptors).
inline constexpr size_t kSegmentCountMax = 2000;

// The owner's thread, as the engine needs it.
struct Owner {
  std::function<void(std::function<void()>)> post;                    // thread safe
  std::function<Status(int fd, std::function<void()>)> watch_hangup;  // once, when the other end is gone
  std::function<void(int fd)> unwatch;
  std::function<void(int64_t delay_ms, std::function<void()>)> call_after;
};

struct EngineOptions {
  uint64_t host_memory_bytes = 0;
  uint64_t device_memory_bytes = 0;  // of replicas on each device; 0: as much as the device has
  bool keep_spans = false;
  // Encodes an index for clients, in a sealed memfd. Called on pool threads.
  std::function<Result<base::Fd>(const tensor::Index&)> encode_index;
  storage::FileSourceOptions reads;  // what it points to must outlive the engine
  memory::HugePages huge_pages = memory::HugePages::wanted;
  int64_t memory_wait_ms = 0;  // how long an open waits for room that others hold, where it does not say so itself
  // Of replicas and kept segments, which evict each other for them as for memory; and of leases, one each.
  size_t descriptor_count_max = 1 << 20;
  size_t lease_count_max = kLeaseCountMax;
};

struct OpenOrder {
  std::string path;  // what the client opened; for people and selectors
  std::vector<OpenFile> files;
  bool index_only = false;
  std::vector<std::string> only;  // names and patterns of the tensors that are wanted; empty: all
  std::string device;             // as ReplicaKey
  Stay stay = Stay::artifact;
  Holder holder;
  std::optional<int64_t> memory_wait_ms;
};

// Clients read what does not fit host_memory in batches of this size: two of one client, one that is copied and one that
// is read, leave half of the memory to others.
inline constexpr uint64_t kBatchBytesMax = 256 << 20;

struct Verification;  // in engine_queries.cc

class Engine {
 public:
  // All references must outlive the engine; the pools' threads must run. The catalog is used on `catalog_thread` alone, a
  // pool of one: its disk may stall for longer than a client should wait for a replica that is resident.
  Engine(EngineOptions options, catalog::Catalog& catalog, storage::ReadPool& catalog_thread, storage::ReadPool& pool,
         Owner owner);
  // Every load must have ended (drain()).
  ~Engine();
  // Set once, before the first replica on a device is opened; must outlive the engine's use.
  void use_devices(Devices& devices) { devices_ = &devices; }
  // `tell` is called on the owner's thread whenever a ready replica (of lease 0), or a lease, has come, changed or gone.
  void use_keeper(std::function<void(uint64_t replica, uint64_t lease)> tell) { tell_keeper_ = std::move(tell); }
  // A ready replica of a daemon before this one: its number, paths, key, owner, pinned, artifact, leaves, and all its
  // memory as allocations; `whole` is the index of its files. Errors leave nothing behind.
  Status adopt(std::unique_ptr<Replica> kept, tensor::Index whole);
  Status add_lease(uint64_t replica, uint64_t lease, Lease held);  // of the replica's owner
  // Replicas to come have this number or a higher one: lower ones mean something to clients of a daemon before this one.
  void number_from(uint64_t first) { next_replica_ = std::max(next_replica_, first); }

  // Grants the replica of these files, loading them first where needed. Two requests for the same unchanged files share
  // one replica and one read; what holds more tensors than are wanted serves too. `done` is called on the owner's thread,
  // maybe at once; the replica may still be filling. An artifact that is to stay and is larger than host_memory: its
  // index alone is granted, for its client to open parts of it.
  //
  // What finds no room waits in line for memory_wait_ms, a batch for as long after each time the line has moved, unless
  // that cannot help: what is in the way is pinned, or held by the process that asks. A later one passes earlier ones
  // only where it fits beside each of them and all that has passed since. Code::exhausted names what holds the memory.
  void open(OpenOrder order, GrantDone done);
  // Drops the requests of an asker that is gone; their `done` is not called.
  void withdraw(uint64_t asker);

  // Under a lower limit, what nobody holds is evicted, now and as it is let go.
  void set_host_memory(uint64_t limit_bytes);

  // One whose headers were read; Code::not_found.
  Result<const Replica*> find(uint64_t replica) const;
  uint64_t last_opened() const { return last_opened_; }  // 0: none

  // Code::denied, naming the holders, when the replica is leased or pinned. A filling one is cancelled; the next open
  // of its files begins anew.
  Status evict(uint64_t replica);
  void set_pinned(uint64_t replica, bool pinned);

  // Hashes every leaf again and compares with what the load recorded; the replica stays until `done` returns.
  // Code::unavailable unless it is ready, Code::cancelled after cancel_all().
  using VerifyDone = std::function<void(Result<std::vector<VerifyFault>>)>;
  void verify(uint64_t replica, VerifyDone done);

  // For somebody who reads the bytes of a replica that fills or is ready: it stays, where it is, until let_go().
  // Code::not_found.
  Result<const Replica*> hold(uint64_t replica);
  void let_go(uint64_t replica);

  // A client waits for blocks [first, last) of a replica: they are read before others. Unknown replicas are ignored.
  void want(uint64_t replica, uint32_t first, uint32_t last);

  // Adds a client's figures to the report of the load that filled `replica`.
  void note_use(uint64_t replica, Use use);

  // Room for a segment to be pre-faulted for loads to come. False when there is none, or when a load waits for memory.
  bool claim_memory(uint64_t size_bytes);
  void settle_claim(uint64_t size_bytes, std::optional<memory::Segment> segment);

  const Replica& replica(uint64_t number) const;
  const std::map<uint64_t, std::unique_ptr<Replica>>& replicas() const { return replicas_; }
  const std::deque<LoadReport>& reports() const { return reports_; }  // of loads that have begun or failed; newest last
  // Of the newest load of a replica, which may be gone, or of what it waits for. Code::not_found when it is forgotten.
  Result<LoadReport> explain(uint64_t replica);
  uint64_t loaded_bytes() const;  // read and checked since the start
  const memory::SegmentPool& memory() const { return pool_memory_; }
  // Of requests and loads that are not done, and of results the catalog has not taken yet.
  size_t running_count() const;
  size_t waiting_count() const { return line_.size(); }  // of those, loads that wait for room

  // No new loads from now on (Code::unavailable); `done` is called when none runs any more.
  void drain(std::function<void()> done);
  // Ends all that runs or waits with Code::cancelled, now and from now on.
  void cancel_all();

 private:
  using Digests = std::vector<tensor::Digest>;  // of leaves, as LoadOrder::expected

  // What reading the headers came to, passed from thread to thread.
  struct Indexed {
    Result<std::shared_ptr<const Content>> content;
    Result<base::Fd> index_fd;
    Digests known;
  };

  void index(Replica& replica);
  void indexed(uint64_t number, Indexed outcome);
  Replica* covering(const Replica& replica);
  void hand_over(Replica& replica, Replica& larger);
  void dismiss(Replica& replica, const std::function<Result<Grant>(const Waiter&)>& answer);
  void begin(Replica& replica, Digests known);
  void decline(Replica& replica, uint64_t memory_bytes);
  Status begin_load(Replica& replica, Digests known);
  void start_load(uint64_t number);

  // engine_devices.cc
  void find_source(Replica& replica);
  void source_found(uint64_t number, const Result<uint64_t>& source);
  void make_on_device(Replica& replica);
  void made_on_device(uint64_t number, Result<Allocations> made);
  Status fill_on_device(Replica& replica, Allocations made);
  void end_on_device(Replica& replica);

  // engine_room.cc
  enum class Room { now, freeing, held };  // freeing: the engine's own doing, and soon over
  void room_changed();
  void serve_line();
  void admit(Replica& replica, Digests known);
  bool turn_away(Replica& replica, Room room);
  void look_again();
  bool can_come(const Replica& replica, const Waiter& waiter) const;
  int64_t patient_until_ns(const Replica& replica, const Waiter& waiter) const;
  uint64_t passed_bytes(uint64_t first_load) const;
  Room make_room(const Replica& replica);
  void evict_all(const std::vector<uint64_t>& victims, const char* why);
  void shrink();
  void give_back(std::vector<memory::Segment> surplus, std::function<void()> then);
  std::vector<EvictionCandidate> candidates(const std::string& device = "") const;
  uint64_t used_on(const std::string& device) const;
  size_t descriptor_count() const;  // without kept segments
  std::string lack(const Replica& replica) const;
  base::Error refusal(const Replica& replica) const;

  // On the catalog thread.
  Result<std::vector<tensor::Digest>> recorded_leaves(const base::FileIdentity& file, const FileLeaves& all);
  Digests known_digests(const Content& content);
  void note_catalog(const Status& status);
  void loaded(uint64_t number, LoadResult result);
  void end_load(Replica& replica, const Result<tensor::Digest>& artifact);
  void cancel_load(Replica& replica, base::Error reason);
  void remember(const Replica& replica);
  Result<Grant> grant(Replica& replica, const Waiter& waiter);
  void lease_ended(uint64_t number, uint64_t lease);
  void drop_passing();
  void fail_waiters(Replica& replica, const base::Error& error);
  void end_drain();
  void verify_portion(std::shared_ptr<Verification> job, std::function<void()> finish);
  void unlist(const Replica& replica);
  void forget(uint64_t number);
  void settle(Replica& replica);  // frees a replica that nobody can use any more
  std::string holders_text(const std::string& device = "") const;
  static LoadReport waiting_report(const Replica& replica);
  static void note_progress(const Replica& replica, LoadReport& report);
  void keep_report(LoadReport report);
  void keep_failed(const Replica& replica, const base::Error& error);  // what waits for it ends with `error`
  LoadReport* report_of(uint64_t replica);

  const EngineOptions options_;
  catalog::Catalog& catalog_;
  storage::ReadPool& catalog_thread_;
  storage::ReadPool& pool_;
  const Owner owner_;
  Devices* devices_ = nullptr;
  std::function<void(uint64_t replica, uint64_t lease)> tell_keeper_ = [](uint64_t, uint64_t) {};
  memory::SegmentPool pool_memory_;

  std::map<uint64_t, std::unique_ptr<Replica>> replicas_;
  std::map<ReplicaKey, uint64_t> by_key_;
  // Indexed, and waiting for room: first come, first served.
  struct InLine {
    uint64_t replica = 0;
    Digests known;
    uint64_t first_load = 0;  // loads from this number on began after it had come
  };
  std::vector<InLine> line_;
  int64_t line_moved_ns_ = 0;       // when somebody in line was admitted last
  bool looks_again_ = false;        // a timer runs
  bool room_changed_ = false;       // and the line is about to hear of it
  uint64_t claimed_bytes_ = 0;      // for segments that are pre-faulted
  uint64_t leaving_bytes_ = 0;      // of segments on their way back to the kernel
  uint64_t loaded_bytes_ = 0;       // by loads that have ended
  std::deque<LoadReport> reports_;  // newest last
  uint64_t next_replica_ = 1;
  uint64_t next_load_ = 1;
  uint64_t next_lease_ = 1;
  uint64_t last_opened_ = 0;
  size_t lease_count_ = 0;
  size_t remembering_count_ = 0;
  std::set<std::string> notes_;          // of loads, that were logged
  bool catalog_failed_ = false;          // said once; belongs to the catalog thread
  std::atomic<bool> cancelling_{false};  // also read by threads that verify
  std::function<void()> drained_;
  bool draining_ = false;
};

// Bytes that block devices delivered to this process so far; 0 where the kernel does not count them.
uint64_t disk_bytes_read();
// What its threads ran so far.
int64_t cpu_time_ns();

}  // namespace tensord::engine
