#include "engine/engine.h"

#include <fcntl.h>

#include <algorithm>
#include <iterator>
#include <numeric>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/text.h"
#include "storage/file_source.h"

namespace tensord::engine {

using base::Code;
using base::fail;
using base::log;
using base::LogLevel;

namespace {
uint64_t memory_bytes_of(const Replica& replica) {
  const std::vector<uint64_t> sizes = memory::segment_sizes(replica.content->image_bytes);
  return std::accumulate(sizes.begin(), sizes.end(), uint64_t{0});
}
}  // namespace

Engine::Engine(EngineOptions options, catalog::Catalog& catalog, storage::ReadPool& catalog_thread,
               storage::ReadPool& pool, Owner owner)
    : options_(std::move(options)),
      catalog_(catalog),
      catalog_thread_(catalog_thread),
      pool_(pool),
      owner_(std::move(owner)),
      pool_memory_(options_.host_memory_bytes) {}

Engine::~Engine() {
  for (auto& [number, replica] : replicas_) {
    for (auto& [lease, held] : replica->leases) owner_.unwatch(held.read_end.get());
  }
}

// ---- opening ------------------------------------------------------------------------------------------------------

void Engine::open(OpenOrder order, GrantDone done) {
  if (draining_) return done(fail(Code::unavailable, "the daemon is stopping; try again when it is back"));
  if (order.files.empty() || order.files.size() > kFileCountMax) {
    return done(fail(Code::invalid_argument, base::text("open ", order.path, ": ", order.files.size(),
                                                        " files; 1 to ", kFileCountMax, " are possible")));
  }
  Key key;
  for (const OpenFile& file : order.files) key.push_back(file.identity);
  const auto known = by_key_.find(key);
  if (known != by_key_.end()) {
    Replica& replica = *replicas_.at(known->second);
    const bool named =
        std::find(replica.paths.begin(), replica.paths.end(), order.path) != replica.paths.end();
    if (!named && replica.paths.size() < kPathCountMax) replica.paths.push_back(std::move(order.path));
    if (!order.index_only) last_opened_ = replica.number;
    const bool waits = replica.state == ReplicaState::waiting && !order.index_only;
    if (replica.state == ReplicaState::indexing || waits) {
      replica.waiters.push_back({order.index_only, std::move(order.holder), std::move(done)});
      if (waits) wake_parked();  // its wait may be hopeless
    } else {
      done(grant(replica, order.index_only, order.holder));
    }
    return;
  }
  auto made = std::make_unique<Replica>();
  Replica& replica = *made;
  replica.number = next_replica_++;
  replica.paths.push_back(std::move(order.path));
  replica.key = key;
  replica.owner = order.holder.user_id;
  replica.files = std::move(order.files);
  replica.asked_ns = replica.last_used_ns = base::monotonic_ns();
  if (!order.index_only) last_opened_ = replica.number;
  replica.waiters.push_back({order.index_only, std::move(order.holder), std::move(done)});
  by_key_[std::move(key)] = replica.number;
  asked_.insert(replica.number);
  replicas_[replica.number] = std::move(made);
  index(replica);
}

void Engine::index(Replica& replica) {
  struct Job {
    uint64_t number;
    const std::vector<OpenFile>* files;  // not touched by the owner while indexing
    uint64_t image_bytes_max;
    Indexed outcome;
  };
  auto job = std::make_shared<Job>(Job{replica.number, &replica.files, pool_memory_.limit_bytes(), {}});
  pool_.post(this, [this, job] {
    Indexed& outcome = job->outcome;
    outcome.content = read_content(*job->files, job->image_bytes_max);
    if (outcome.content) outcome.index_file = options_.encode_index((*outcome.content)->index);
    // A header that was being rewritten looks corrupt: say what really happened.
    for (size_t at = 0; !outcome.content && at < job->files->size(); ++at) {
      const OpenFile& file = (*job->files)[at];
      const Status same = base::check_unchanged(file.fd.get(), file.identity, file.path);
      if (!same) outcome.content = base::pass_on(same);
    }
    catalog_thread_.post(this, [this, job] {
      if (job->outcome.content) job->outcome.known = known_digests(**job->outcome.content);
      owner_.post([this, job] { indexed(job->number, std::move(job->outcome)); });
    });
  });
}

void Engine::indexed(uint64_t number, Indexed outcome) {
  Replica& replica = *replicas_.at(number);
  if (!outcome.content) return fail_waiters(replica, outcome.content.error());
  if (!outcome.index_file) return fail_waiters(replica, outcome.index_file.error());
  replica.content = std::move(*outcome.content);
  replica.index_file = std::move(*outcome.index_file);
  begin(replica, std::move(outcome.known));
}

// From an index to the line of those who wait for room, or to grants of the index alone.
void Engine::begin(Replica& replica, Digests known) {
  std::vector<Waiter> waiters;
  for (Waiter& waiter : std::exchange(replica.waiters, {})) {
    if (waiter.index_only) {
      waiter.done(grant(replica, true, waiter.holder));
    } else {
      waiters.push_back(std::move(waiter));
    }
  }
  if (waiters.empty()) {  // or all who asked are gone
    forget(replica.number);
    return end_drain();
  }
  replica.waiters = std::move(waiters);
  replica.state = ReplicaState::waiting;
  replica.room_ns = base::monotonic_ns();
  parked_.push_back({replica.number, std::move(known)});
  retry_parked();
  if (!parked_.empty() && options_.memory_wait_ms > 0) {
    owner_.call_after(options_.memory_wait_ms, [this] { retry_parked(); });
  }
}

// The first that has to wait keeps all behind it waiting: small ones would pass a large one for ever.
void Engine::retry_parked() {
  std::optional<Room> ahead;
  for (Parked& parked : std::exchange(parked_, {})) {
    Replica& replica = *replicas_.at(parked.replica);
    if (cancelling_) {
      fail_waiters(replica,
                   {Code::cancelled, base::text("open ", replica.path(), ": the daemon was stopped")});
      continue;
    }
    if (refuse_hopeless(replica)) continue;
    const Room room = ahead ? *ahead : make_room(replica);
    if (room == Room::now) {
      const Status begun = begin_load(replica, std::move(parked.known));
      if (!begun) {
        fail_waiters(replica, begun.error());
        continue;
      }
      asked_.erase(replica.number);
      for (Waiter& waiter : std::exchange(replica.waiters, {})) {
        waiter.done(grant(replica, false, waiter.holder));
      }
      continue;
    }
    const int64_t waited_ns = base::monotonic_ns() - replica.room_ns;
    if (room == Room::held && waited_ns >= options_.memory_wait_ms * 1'000'000) {
      fail_waiters(replica, refusal(replica));
      continue;
    }
    const std::string bytes = base::human_bytes(memory_bytes_of(replica));
    replica.waits_for = ahead                   ? base::text(bytes, ", after others that wait for memory")
                        : room == Room::freeing ? base::text(bytes, " that are being given back")
                                                : base::text(bytes, "; held: ", holders_text());
    if (!ahead) ahead = room;
    parked_.push_back(std::move(parked));
  }
}

void Engine::wake_parked() {
  if (!parked_.empty()) owner_.post([this] { retry_parked(); });
}

// Refuses those whom waiting cannot help; true when nobody is left. A process that waits here does not let go meanwhile.
bool Engine::refuse_hopeless(Replica& replica) {
  const uint64_t needed_bytes = memory_bytes_of(replica);
  const uint64_t limit_bytes = pool_memory_.limit_bytes();
  // It has no layout when it was over the limit that held when its header was read.
  if (needed_bytes > limit_bytes || replica.content->layout.size_bytes < replica.content->image_bytes) {
    fail_waiters(replica, {Code::exhausted, base::text("open ", replica.path(), ": it needs ",
                                                       base::human_bytes(needed_bytes), ", host_memory is ",
                                                       base::human_bytes(limit_bytes), "; raise host_memory")});
    return true;
  }
  const auto hopeless = [&](const Waiter& waiter) {
    uint64_t fixed_bytes = 0;
    for (const auto& [number, other] : replicas_) {
      if (other->pinned || other->is_leased_by(waiter.holder.process_id)) {
        fixed_bytes += other->memory.size_bytes();
      }
    }
    return fixed_bytes > limit_bytes - needed_bytes;
  };
  std::vector<Waiter> refused;
  std::erase_if(replica.waiters, [&](Waiter& waiter) {
    if (!hopeless(waiter)) return false;
    refused.push_back(std::move(waiter));
    return true;
  });
  if (refused.empty()) return false;
  const base::Error error = refusal(replica);
  if (replica.waiters.empty()) {
    replica.waiters = std::move(refused);
    fail_waiters(replica, error);
    return true;
  }
  for (const Waiter& waiter : refused) waiter.done(tl::unexpected(error));
  return false;
}

void Engine::withdraw(uint64_t asker) {
  std::vector<uint64_t> unwanted;
  for (const uint64_t number : asked_) {
    Replica& replica = *replicas_.at(number);
    std::erase_if(replica.waiters, [&](const Waiter& waiter) { return waiter.holder.asker == asker; });
    if (replica.waiters.empty() && replica.state == ReplicaState::waiting) unwanted.push_back(number);
  }
  for (const uint64_t number : unwanted) {
    std::erase_if(parked_, [&](const Parked& parked) { return parked.replica == number; });
    forget(number);
  }
  end_drain();
}

void Engine::fail_waiters(Replica& replica, const base::Error& error) {
  log(LogLevel::warning, "not opened: ", error.message);
  const auto waiters = std::exchange(replica.waiters, {});
  forget(replica.number);
  for (const Waiter& waiter : waiters) waiter.done(tl::unexpected(error));
  end_drain();
}

Result<Grant> Engine::grant(Replica& replica, bool index_only, const Holder& holder) {
  Grant granted;
  granted.replica = replica.number;
  granted.content = replica.content;
  granted.index_fd = replica.index_file.fd.get();
  granted.index_bytes = replica.index_file.size_bytes;
  if (index_only) return granted;
  if (holder.user_id != replica.owner) {
    return fail(Code::denied, base::text(replica.path(), " was opened by uid ", replica.owner,
                                         ", you are uid ", holder.user_id));
  }
  if (lease_count_ >= options_.lease_count_max) {
    return fail(Code::exhausted, base::text("open ", replica.path(), ": ", lease_count_,
                                            " leases are held, no more are possible; raise ulimit -n"));
  }
  TRY_ASSIGN(base::Pipe pipe, base::make_pipe());
  const uint64_t lease = next_lease_++;
  TRY(owner_.watch_hangup(pipe.read_end.get(),
                          [this, number = replica.number, lease] { lease_ended(number, lease); }));
  replica.leases[lease] = Lease{std::move(pipe.read_end), holder, base::monotonic_ns()};
  ++lease_count_;
  granted.lease = std::move(pipe.write_end);
  granted.fill_map_fd = replica.fill->fd();
  granted.fill_map_bytes = replica.fill->size_bytes();
  for (const memory::Segment& segment : replica.memory.segments) {
    granted.segment_fds.push_back(segment.fd());
    granted.segment_bytes.push_back(segment.size_bytes());
  }
  return granted;
}

void Engine::lease_ended(uint64_t number, uint64_t lease) {
  Replica& replica = *replicas_.at(number);
  const auto ended = replica.leases.find(lease);
  CHECK(ended != replica.leases.end());
  owner_.unwatch(ended->second.read_end.get());
  replica.leases.erase(ended);
  --lease_count_;
  replica.last_used_ns = base::monotonic_ns();
  settle(replica);
}

// ---- loading ------------------------------------------------------------------------------------------------------

Status Engine::begin_load(Replica& replica, Digests known) {
  const Content& content = *replica.content;
  // Kept segments go for descriptors too.
  const size_t others = descriptor_count() - pool_memory_.kept_count() +
                        memory::segment_sizes(content.layout.size_bytes).size();
  std::vector<memory::Segment> surplus = pool_memory_.trim(
      pool_memory_.kept_bytes(), options_.descriptor_count_max - std::min(others, options_.descriptor_count_max));
  TRY_ASSIGN(memory::SegmentPool::Allocation allocation,
             pool_memory_.allocate(content.layout.size_bytes, replica.owner));
  std::move(allocation.surplus.begin(), allocation.surplus.end(), std::back_inserter(surplus));
  replica.memory = std::move(allocation.run);
  if (replica.memory.segments.size() > kSegmentCountMax) {
    return fail(Code::unsupported,
                base::text("open ", replica.path(), ": ", replica.memory.segments.size(),
                           " segments; a client can be handed at most ", kSegmentCountMax));
  }
  uint64_t total_bytes = 0;
  for (const tensor::Block& block : content.layout.blocks) total_bytes += block.size_bytes;
  TRY_ASSIGN(replica.fill, memory::FillMap::create(content.layout.blocks.size(), total_bytes));

  LoadReport report{.load = next_load_++, .replica = replica.number, .path = replica.path()};
  report.begin_ns = replica.asked_ns;
  report.index_ns = content.index_ns;
  report.memory_ns = base::monotonic_ns() - replica.room_ns;
  report.thread_count = static_cast<uint32_t>(pool_.thread_count());
  report.disk_bytes = disk_bytes_read();  // at the beginning; the difference is taken at the end
  report.checked_against_record =
      std::all_of(known.begin(), known.end(), [](const auto& leaves) { return !leaves.empty(); });

  std::vector<storage::SourceFile> files;
  for (OpenFile& file : replica.files) files.push_back({std::move(file.fd), file.path, file.identity});
  replica.files.clear();
  LoadOrder order{.content = replica.content,
                  .source = storage::make_file_source(std::move(files), pool_),
                  .image = replica.memory.data(),
                  .fill = &*replica.fill,
                  .expected = std::move(known),
                  .depth = 2 * static_cast<uint32_t>(pool_.thread_count()),
                  .keep_spans = options_.keep_spans};
  replica.load = std::make_unique<Load>(std::move(order), [this, number = replica.number](LoadResult result) {
    auto shared = std::make_shared<LoadResult>(std::move(result));
    owner_.post([this, number, shared] { loaded(number, std::move(*shared)); });
  });
  replica.state = ReplicaState::filling;
  replica.load_number = report.load;
  reports_.push_back(std::move(report));
  if (reports_.size() > kLoadReportCountMax) reports_.pop_front();
  log(LogLevel::info, "load ", replica.load_number, ": ", replica.path(), ", ",
      base::human_bytes(total_bytes), " in ", content.index.tensors.size(), " tensors");
  start_after(std::move(surplus), replica.number);
  return {};
}

// What goes to make room is given back to the kernel first, on a pool thread. Loads begin in the order in which they got
// their room: what has to go for one of them may be more than it needs, and count as room for the next.
void Engine::start_after(std::vector<memory::Segment> surplus, uint64_t replica) {
  if (surplus.empty() && replica == 0) return;
  auto start = std::make_shared<Start>(Start{replica, surplus.empty()});
  starts_.push_back(start);
  if (start->due) return owner_.post([this] { start_due(); });
  auto shared = std::make_shared<std::vector<memory::Segment>>(std::move(surplus));
  pool_.post(this, [this, start, shared, post = owner_.post] {
    shared->clear();
    post([this, start] {
      start->due = true;
      start_due();
    });
  });
}

void Engine::start_due() {
  while (!starts_.empty() && starts_.front()->due) {
    const auto replica = replicas_.find(starts_.front()->replica);
    starts_.pop_front();
    if (replica != replicas_.end() && replica->second->load) replica->second->load->start();
  }
}

std::vector<EvictionCandidate> Engine::candidates() const {
  std::vector<EvictionCandidate> all;
  for (const auto& [number, replica] : replicas_) {
    all.push_back({number, replica->memory.size_bytes(), replica->descriptor_count(), replica->last_used_ns,
                   replica->held()});
  }
  return all;
}

size_t Engine::descriptor_count() const {
  size_t count = pool_memory_.kept_count();
  for (const auto& [number, replica] : replicas_) count += replica->descriptor_count();
  return count;
}

Engine::Room Engine::make_room(const Replica& replica) {
  const auto missing = [](uint64_t wanted, uint64_t most) { return wanted > most ? wanted - most : 0; };
  const uint64_t needed_bytes =
      missing(pool_memory_.in_use_bytes() + memory_bytes_of(replica), pool_memory_.limit_bytes());
  const size_t needed_descriptors =
      missing(descriptor_count() - pool_memory_.kept_count() +
                  memory::segment_sizes(replica.content->image_bytes).size(),
              options_.descriptor_count_max);
  if (needed_bytes == 0 && needed_descriptors == 0) return Room::now;
  if (needed_bytes <= claimed_bytes_ && needed_descriptors == 0) return Room::freeing;
  const auto victims =
      choose_victims(candidates(), missing(needed_bytes, claimed_bytes_), needed_descriptors);
  if (!victims) return Room::held;
  Room room = claimed_bytes_ > 0 ? Room::freeing : Room::now;
  for (const uint64_t victim : *victims) {
    log(LogLevel::info, "evict replica ", victim, " (", replicas_.at(victim)->path(), ") to make room");
    if (replicas_.at(victim)->abandoned()) room = Room::freeing;
    CHECK(evict(victim));
  }
  return room;
}

base::Error Engine::refusal(const Replica& replica) const {
  const auto waited_ns = static_cast<double>(base::monotonic_ns() - replica.room_ns);
  const std::string waited = waited_ns < 1e9 ? "" : base::text(" (waited ", waited_ns / 1e9, " s)");
  const std::string holders = holders_text();
  const std::string needed = base::human_bytes(memory_bytes_of(replica));
  const std::string lack =
      memory_bytes_of(replica) > pool_memory_.free_bytes()
          ? base::text(needed, ", but of host_memory ", base::human_bytes(pool_memory_.limit_bytes()), " only ",
                       base::human_bytes(pool_memory_.free_bytes()), " are free")
          : base::text(needed, " and descriptors, but those for ", options_.descriptor_count_max,
                       " files (half of ulimit -n) are in use");
  return {Code::exhausted,
          base::text("open ", replica.path(), ": it needs ", lack, ", and the rest cannot be evicted: ",
                     holders.empty() ? "others wait for it" : holders, waited,
                     "; close or unpin some of them, or raise ",
                     memory_bytes_of(replica) > pool_memory_.free_bytes() ? "host_memory" : "ulimit -n")};
}

void Engine::set_host_memory(uint64_t limit_bytes) {
  const uint64_t before_bytes = pool_memory_.limit_bytes();
  if (limit_bytes == before_bytes) return;
  if (limit_bytes < pool_memory_.in_use_bytes()) evict_for(pool_memory_.in_use_bytes() - limit_bytes);
  start_after(pool_memory_.set_limit(limit_bytes), 0);
  const uint64_t in_use_bytes = pool_memory_.in_use_bytes();
  log(LogLevel::warning, "host_memory is now ", base::human_bytes(limit_bytes), ", it was ",
      base::human_bytes(before_bytes), ": the memory limit changed",
      in_use_bytes <= limit_bytes ? ""
                                  : base::text("; ", base::human_bytes(in_use_bytes),
                                               " are in use and stay until they are let go: ", holders_text()));
  wake_parked();
}

// Evicts what nobody holds for `needed_bytes`, and for what is in use over the limit; as far as that goes.
void Engine::evict_for(uint64_t needed_bytes) {
  const uint64_t limit_bytes = pool_memory_.limit_bytes();
  needed_bytes += std::max(pool_memory_.in_use_bytes(), limit_bytes) - limit_bytes;
  if (needed_bytes == 0) return;
  uint64_t evictable_bytes = 0;
  const std::vector<EvictionCandidate> all = candidates();
  for (const EvictionCandidate& one : all) evictable_bytes += one.held ? 0 : one.memory_bytes;
  const auto victims = choose_victims(all, std::min(needed_bytes, evictable_bytes), 0);
  for (const uint64_t victim : *victims) {
    log(LogLevel::info, "evict replica ", victim, " (", replicas_.at(victim)->path(), "): over the limit");
    CHECK(evict(victim));
  }
}

bool Engine::claim_memory(uint64_t size_bytes) {
  if (!parked_.empty() || !starts_.empty() || !pool_memory_.claim(size_bytes)) return false;
  claimed_bytes_ += size_bytes;
  return true;
}

void Engine::settle_claim(uint64_t size_bytes, std::optional<memory::Segment> segment) {
  claimed_bytes_ -= size_bytes;
  pool_memory_.settle_claim(size_bytes, std::move(segment));
  retry_parked();
}

std::string Engine::holders_text() const {
  constexpr size_t kShownMax = 8;
  std::string out;
  size_t shown = 0;
  for (const auto& [number, replica] : replicas_) {
    if (!replica->held() || replica->memory.segments.empty()) continue;
    if (shown++ == kShownMax) return out + ", and others";
    if (!out.empty()) out += ", ";
    out += base::text("replica ", number, " ", replica->path(), " (",
                      base::human_bytes(replica->memory.size_bytes()));
    if (replica->pinned) out += ", pinned";
    if (replica->state == ReplicaState::filling) out += ", filling";
    for (const auto& [lease, held] : replica->leases) {
      out += base::text(", leased by ", held.holder.process_name, " pid ", held.holder.process_id);
    }
    out += ")";
  }
  return out;
}

Engine::Digests Engine::known_digests(const Content& content) {
  Digests known(content.identities.size());
  for (uint32_t file = 0; file < content.layout_digests.size(); ++file) {
    auto record = catalog_.find_file(content.identities[file]);
    if (!record) {
      note_catalog(base::pass_on(record));
      break;
    }
    const auto [first, last] = leaves_of_file(content, file);
    if (*record && (*record)->layout_digest == content.layout_digests[file] &&
        (*record)->leaves.size() == last - first) {
      known[file] = std::move((*record)->leaves);
    }
  }
  return known;
}

void Engine::loaded(uint64_t number, LoadResult result) {
  Replica& replica = *replicas_.at(number);
  replica.load.reset();
  if (LoadReport* report = report_of(number)) {
    report->wall_ns = base::monotonic_ns() - report->begin_ns;
    report->counters = result.counters;
    report->disk_bytes = disk_bytes_read() - report->disk_bytes;
    report->spans = std::move(result.spans);
    report->state = result.status ? LoadState::ready : LoadState::failed;
    if (result.status) report->artifact = result.artifact_id;
    if (!result.status) report->error = result.status.error();
    log(LogLevel::info, "load ", report->load, ": ", result.status ? "ready" : result.status.error().message,
        ", ", base::human_bytes(result.counters.bytes), " in ", static_cast<double>(report->wall_ns) / 1e9,
        " s");
  }
  replica.last_used_ns = base::monotonic_ns();
  if (result.status) {
    replica.state = ReplicaState::ready;
    replica.artifact = result.artifact_id;
    replica.leaves = std::move(result.leaves);
    replica.fill->end_ready(result.artifact_id);
    remember(replica);
  } else {
    replica.state = ReplicaState::failed;
    replica.error = result.status.error();
    replica.fill->end_failed(result.status.error());
    unlist(replica);  // the next open tries again
  }
  settle(replica);
  end_drain();
}

// Says it once when the catalog begins to fail: the daemon serves without it.
void Engine::note_catalog(const Status& status) {
  if (!status && !catalog_failed_) {
    log(LogLevel::warning, "catalog: ", status.error().message,
        "; the digests of loads are not kept, later ones cannot be checked against them");
  }
  catalog_failed_ = !status;
}

void Engine::remember(const Replica& replica) {
  const Content& content = *replica.content;
  catalog::ArtifactRecord artifact{*replica.artifact, replica.path(), content.index.payload_bytes(),
                                   content.index.tensors.size(), content.identities};
  std::vector<catalog::FileRecord> files;
  for (uint32_t file = 0; file < content.identities.size(); ++file) {
    const auto [first, last] = leaves_of_file(content, file);
    files.push_back({content.identities[file],
                     content.index.files[file].path,
                     content.layout_digests[file],
                     {replica.leaves.begin() + first, replica.leaves.begin() + last}});
  }
  ++remembering_count_;
  catalog_thread_.post(this, [this, artifact = std::move(artifact), files = std::move(files)] {
    note_catalog(catalog_.remember(artifact, files));
    owner_.post([this] {
      --remembering_count_;
      end_drain();
    });
  });
}

// ---- letting go ---------------------------------------------------------------------------------------------------

void Engine::settle(Replica& replica) {
  const bool used = replica.load || !replica.leases.empty() || replica.verify_count > 0;
  if (!used && (replica.state == ReplicaState::failed || replica.doomed)) return forget(replica.number);
  evict_for(0);
  wake_parked();
}

// Nobody finds it by its files any more.
void Engine::unlist(const Replica& replica) {
  const auto key = by_key_.find(replica.key);
  if (key != by_key_.end() && key->second == replica.number) by_key_.erase(key);
}

void Engine::forget(uint64_t number) {
  const auto found = replicas_.find(number);
  Replica& replica = *found->second;
  CHECK(!replica.load && replica.leases.empty());
  unlist(replica);
  pool_memory_.free(std::move(replica.memory));
  start_after(pool_memory_.trim(pool_memory_.free_bytes(), SIZE_MAX), 0);
  asked_.erase(number);
  replicas_.erase(found);
  wake_parked();
}

Status Engine::evict(uint64_t number) {
  Replica& replica = *replicas_.at(number);
  if (replica.pinned) {
    return fail(Code::denied,
                base::text("replica ", number, " ", replica.path(), " is pinned; unpin it first"));
  }
  if (!replica.leases.empty()) {
    const Holder& holder = replica.leases.begin()->second.holder;
    const std::string others =
        replica.leases.size() == 1 ? "" : base::text(" and ", replica.leases.size() - 1, " more");
    return fail(Code::denied,
                base::text("replica ", number, " ", replica.path(), " is leased by ", holder.process_name,
                           " pid ", holder.process_id, others, "; close it there first"));
  }
  if (replica.state <= ReplicaState::waiting || replica.verify_count > 0) {
    return fail(Code::unavailable,
                base::text("replica ", number, " ", replica.path(), " is busy; try again"));
  }
  if (replica.load) {
    replica.doomed = true;
    unlist(replica);
    replica.load->cancel(
        {Code::cancelled, base::text("load of ", replica.path(), ": evicted while it was filling")});
    return {};
  }
  forget(number);
  return {};
}

void Engine::set_pinned(uint64_t number, bool pinned) {
  Replica& replica = *replicas_.at(number);
  replica.pinned = pinned;
  settle(replica);
}

void Engine::drain(std::function<void()> done) {
  draining_ = true;
  if (running_count() == 0) return done();
  drained_ = std::move(done);
}

void Engine::end_drain() {
  if (drained_ && running_count() == 0) std::exchange(drained_, nullptr)();
}

void Engine::cancel_all() {
  cancelling_ = true;
  retry_parked();
  for (auto& [number, replica] : replicas_) {
    if (replica->load) {
      replica->load->cancel(
          {Code::cancelled, base::text("load of ", replica->path(), ": the daemon was stopped")});
    }
  }
}

size_t Engine::running_count() const {
  const auto busy = std::count_if(replicas_.begin(), replicas_.end(), [](const auto& entry) {
    return entry.second->state <= ReplicaState::filling || entry.second->verify_count > 0;
  });
  return static_cast<size_t>(busy) + remembering_count_;
}

}  // namespace tensord::engine
