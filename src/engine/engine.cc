#include "engine/engine.h"

#include <fcntl.h>

#include <algorithm>
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

bool is_zero(const tensor::Digest& digest) { return digest == tensor::Digest(); }

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
    return done(fail(Code::invalid_argument, "open ", order.path, ": ", order.files.size(), " files; 1 to ",
                     kFileCountMax, " are possible"));
  }
  ReplicaKey key{.only = std::move(order.only)};
  if (!order.index_only) key.device = std::move(order.device);
  for (const OpenFile& file : order.files) key.files.push_back(file.identity);
  std::sort(key.only.begin(), key.only.end());
  key.only.erase(std::unique(key.only.begin(), key.only.end()), key.only.end());
  Waiter waiter{.index_only = order.index_only,
                .stay = order.stay,
                .holder = std::move(order.holder),
                .done = std::move(done),
                .asked_ns = base::monotonic_ns(),
                .patience_ns = order.memory_wait_ms.value_or(options_.memory_wait_ms) * base::kNsPerMs};
  if (!key.device.empty() && devices_ == nullptr)
    return waiter.done(fail(Code::unsupported, "this daemon has no GPUs"));
  const auto known = by_key_.find(key);
  if (known != by_key_.end()) {
    Replica& replica = *replicas_.at(known->second);
    replica.add_path(order.path);
    if (!order.index_only) last_opened_ = replica.number;
    const bool waits = replica.state == ReplicaState::waiting && !waiter.index_only;
    if (replica.state == ReplicaState::indexing || waits) {
      replica.waiters.push_back(std::move(waiter));
      return room_changed();  // it may have no patience
    }
    LoadReport* report = report_of(replica.number);
    if (report != nullptr && !order.index_only && replica.state == ReplicaState::ready)
      report->reopened_ns = base::monotonic_ns();
    return waiter.done(grant(replica, waiter));
  }
  auto made = std::make_unique<Replica>();
  Replica& replica = *made;
  replica.number = next_replica_++;
  replica.paths.push_back(std::move(order.path));
  replica.key = key;
  replica.owner = waiter.holder.user_id;
  replica.files = std::move(order.files);
  replica.asked_ns = replica.last_used_ns = base::monotonic_ns();
  if (!order.index_only) last_opened_ = replica.number;
  replica.waiters.push_back(std::move(waiter));
  by_key_[std::move(key)] = replica.number;
  replicas_[replica.number] = std::move(made);
  replica.key.device.empty() ? index(replica) : find_source(replica);
}

void Engine::index(Replica& replica) {
  ContentOrder order{.only = replica.key.only, .image_bytes_max = pool_memory_.limit_bytes()};
  for (const auto& [number, other] : replicas_) {
    if (other->content == nullptr || other->key.files != replica.key.files) continue;
    order.whole = other->content->whole == nullptr ? other->content : other->content->whole;
  }
  auto outcome = std::make_shared<Indexed>();
  const std::vector<OpenFile>& files = replica.files;  // not touched by the owner while indexing
  pool_.post(this, [this, number = replica.number, &files, order = std::move(order), outcome] {
    outcome->content = read_content(files, order);
    if (outcome->content) outcome->index_fd = options_.encode_index((*outcome->content)->index);
    // A header that was being rewritten looks corrupt: say what really happened.
    for (size_t at = 0; !outcome->content && at < files.size(); ++at) {
      const Status same = base::check_unchanged(files[at].fd.get(), files[at].identity, files[at].path);
      if (!same) outcome->content = base::pass_on(same);
    }
    catalog_thread_.post(this, [this, number, outcome] {
      if (outcome->content) outcome->known = known_digests(**outcome->content);
      owner_.post([this, number, outcome] { indexed(number, std::move(*outcome)); });
    });
  });
}

void Engine::indexed(uint64_t number, Indexed outcome) {
  Replica& replica = *replicas_.at(number);
  if (!outcome.content) return fail_waiters(replica, outcome.content.error());
  if (!outcome.index_fd) return fail_waiters(replica, outcome.index_fd.error());
  replica.content = std::move(*outcome.content);
  replica.image_bytes = replica.content->image_bytes;
  replica.index_fd = std::move(*outcome.index_fd);
  begin(replica, std::move(outcome.known));
}

// Another replica that holds all tensors of this one.
Replica* Engine::covering(const Replica& replica) {
  const auto covers = [&](const Replica& other) {
    if (other.number == replica.number || other.key.files != replica.key.files || other.doomed) return false;
    if (other.key.device != replica.key.device) return false;
    if (other.state != ReplicaState::filling && other.state != ReplicaState::ready) return false;
    const auto has = [&](const tensor::Tensor& tensor) { return other.content->index.find(tensor.name) != nullptr; };
    const auto& wanted = replica.content->index.tensors;
    return other.content->whole == nullptr || std::all_of(wanted.begin(), wanted.end(), has);
  };
  for (const auto& [number, other] : replicas_) {
    if (covers(*other)) return other.get();
  }
  return nullptr;
}

void Engine::hand_over(Replica& replica, Replica& larger) {
  larger.add_path(replica.path());
  if (last_opened_ == replica.number) last_opened_ = larger.number;
  dismiss(replica, [&](const Waiter& waiter) { return grant(larger, waiter); });
}

// Nobody waits for it any more: it goes, and each is answered.
void Engine::dismiss(Replica& replica, const std::function<Result<Grant>(const Waiter&)>& answer) {
  const auto waiters = std::exchange(replica.waiters, {});
  forget(replica.number);
  for (const Waiter& waiter : waiters) waiter.done(answer(waiter));
}

// From an index to the line of those who wait for room, and to grants of the index alone.
void Engine::begin(Replica& replica, Digests known) {
  replica.state = ReplicaState::waiting;
  replica.room_ns = base::monotonic_ns();
  for (Waiter& waiter : std::exchange(replica.waiters, {})) {
    if (waiter.index_only) waiter.done(grant(replica, waiter));
    if (!waiter.index_only) replica.waiters.push_back(std::move(waiter));
  }
  if (replica.waiters.empty()) return forget(replica.number);  // or all who asked are gone
  line_.push_back({replica.number, std::move(known), next_load_});
  serve_line();
}

// It can never be loaded whole: who wanted it to stay gets the index alone.
void Engine::decline(Replica& replica, uint64_t memory_bytes) {
  const std::string why = base::text("open ", replica.path(), ": it needs ", base::human_bytes(memory_bytes),
                                     ", host_memory is ", base::human_bytes(pool_memory_.limit_bytes()));
  log(LogLevel::warning, why, "; it is not kept, clients read it in batches (resident=\"view\")");
  for (Waiter& waiter : std::exchange(replica.waiters, {})) {
    if (waiter.stay != Stay::artifact) {
      waiter.done(fail(Code::exhausted, why + "; raise host_memory"));
      continue;
    }
    waiter.index_only = true;
    waiter.done(grant(replica, waiter));
  }
  forget(replica.number);
}

void Engine::fail_waiters(Replica& replica, const base::Error& error) {
  log(LogLevel::warning, "not opened: ", error.message);
  keep_failed(replica, error);
  dismiss(replica, [&](const Waiter&) { return tl::unexpected(error); });
}

Result<Grant> Engine::grant(Replica& replica, const Waiter& waiter) {
  const Holder& holder = waiter.holder;
  Grant granted;
  granted.memory_bytes_max = pool_memory_.limit_bytes();
  granted.batch_bytes = std::min(kBatchBytesMax, granted.memory_bytes_max / 4);
  granted.replica = replica.number;
  granted.content = replica.content;
  granted.index_fd = replica.index_fd.get();
  granted.image_bytes = replica.image_bytes;
  if (waiter.index_only) return granted;
  if (holder.user_id != replica.owner) {
    return fail(Code::denied, replica.path(), " was opened by uid ", replica.owner, ", you are uid ", holder.user_id);
  }
  TRY_ASSIGN(base::Pipe pipe, base::make_pipe());
  const uint64_t lease = next_lease_;
  TRY(add_lease(replica.number, lease,
                {std::move(pipe.read_end), holder, base::monotonic_ns(), waiter.stay >= Stay::batch}));
  const bool was_kept = replica.stays;
  replica.stays = replica.stays || waiter.stay == Stay::artifact;
  tell_keeper_(replica.number, was_kept ? lease : 0);
  granted.lease = std::move(pipe.write_end);
  granted.fill_map_fd = replica.fill->fd();
  granted.fill_map_bytes = replica.fill->size_bytes();
  for (const memory::Segment& segment : replica.memory.segments) {
    granted.segment_fds.push_back(segment.fd());
    granted.segment_bytes.push_back(segment.size_bytes());
  }
  for (const auto& [fd, size_bytes] : replica.allocations) {
    granted.segment_fds.push_back(fd.get());
    granted.segment_bytes.push_back(size_bytes);
  }
  return granted;
}

Status Engine::add_lease(uint64_t number, uint64_t lease, Lease held) {
  const auto found = replicas_.find(number);
  if (found == replicas_.end() || found->second->leases.contains(lease))
    return fail(Code::invalid_argument, "lease ", lease, " is there already, or its replica ", number, " is not");
  Replica& replica = *found->second;
  if (lease_count_ >= options_.lease_count_max) {
    return fail(Code::exhausted, "open ", replica.path(), ": ", lease_count_,
                " leases are held, no more are possible; raise ulimit -n");
  }
  TRY(owner_.watch_hangup(held.read_end.get(), [this, number, lease] { lease_ended(number, lease); }));
  held.holder.user_id = replica.owner;
  replica.leases[lease] = std::move(held);
  ++lease_count_;
  next_lease_ = std::max(next_lease_, lease + 1);
  return {};
}

void Engine::lease_ended(uint64_t number, uint64_t lease) {
  Replica& replica = *replicas_.at(number);
  const auto ended = replica.leases.find(lease);
  CHECK(ended != replica.leases.end());
  owner_.unwatch(ended->second.read_end.get());
  replica.leases.erase(ended);
  --lease_count_;
  tell_keeper_(number, lease);
  replica.last_used_ns = base::monotonic_ns();
  settle(replica);
  drop_passing();
}

// ---- loading ------------------------------------------------------------------------------------------------------

Status Engine::begin_load(Replica& replica, Digests known) {
  const Content& content = *replica.content;
  TRY_ASSIGN(replica.memory, pool_memory_.allocate(content.layout.size_bytes, replica.owner));
  if (replica.memory.segments.size() > kSegmentCountMax) {
    return fail(Code::unsupported, "open ", replica.path(), ": ", replica.memory.segments.size(),
                " segments; a client can be handed at most ", kSegmentCountMax);
  }
  const uint64_t total_bytes = content.layout.block_bytes();
  TRY_ASSIGN(replica.fill, memory::FillMap::create(content.layout.blocks.size(), total_bytes));

  LoadReport report = waiting_report(replica);
  report.load = next_load_++;
  report.state = ReplicaState::filling;
  report.thread_count = static_cast<uint32_t>(pool_.thread_count());
  report.disk_bytes = disk_bytes_read();  // at the beginning; the difference is taken at the end
  report.cpu_ns = cpu_time_ns();
  report.checked_against_record = replica.checked = std::none_of(known.begin(), known.end(), is_zero);

  replica.pages.emplace(replica.memory.segments, content.layout.size_bytes, options_.huge_pages);
  LoadOrder order{.content = replica.content,
                  .source = storage::make_file_source(std::exchange(replica.files, {}), pool_, options_.reads),
                  .image = replica.memory.data(),
                  .fill = &*replica.fill,
                  .pages = &*replica.pages,
                  .expected = std::move(known),
                  .thread_count = static_cast<uint32_t>(pool_.thread_count()),
                  .keep_spans = options_.keep_spans};
  replica.load = std::make_unique<Load>(std::move(order), [this, number = replica.number](LoadResult result) {
    auto shared = std::make_shared<LoadResult>(std::move(result));
    owner_.post([this, number, shared] { loaded(number, std::move(*shared)); });
  });
  replica.state = ReplicaState::filling;
  replica.load_number = report.load;
  keep_report(std::move(report));
  log(LogLevel::info, "load ", replica.load_number, ": ", replica.path(), ", ", base::human_bytes(total_bytes), " in ",
      content.index.tensors.size(), " tensors");
  // Kept segments go for descriptors too.
  std::vector<memory::Segment> surplus =
      pool_memory_.trim(options_.descriptor_count_max - std::min(descriptor_count(), options_.descriptor_count_max));
  give_back(std::move(surplus), [this, number = replica.number] { start_load(number); });
  return {};
}

void Engine::start_load(uint64_t number) {
  Replica& replica = *replicas_.at(number);
  if (LoadReport* report = report_of(number)) {
    report->fill_ns = base::monotonic_ns();
    report->memory_ns = report->fill_ns - replica.room_ns;
  }
  replica.load->start();
}

// What the catalog has of a file, if its tensors lay there then as they do now; else empty.
Result<std::vector<tensor::Digest>> Engine::recorded_leaves(const base::FileIdentity& file, const FileLeaves& all) {
  TRY_ASSIGN(auto record, catalog_.find_file(file));
  if (!record || record->layout_digest != all.layout_digest || record->leaves.size() != all.count)
    return std::vector<tensor::Digest>();
  return std::move(record->leaves);
}

Engine::Digests Engine::known_digests(const Content& content) {
  Digests known(content.layout.leaves.size());
  for (uint32_t file = 0; file < content.identities.size(); ++file) {
    const auto [first, last] = leaves_of_file(content, file);
    const FileLeaves& all = content.file_leaves[file];
    if (first == last || all.count == 0) continue;
    const auto recorded = recorded_leaves(content.identities[file], all);
    if (!recorded) {
      note_catalog(base::pass_on(recorded));
      break;
    }
    for (uint32_t at = first; at < last && !recorded->empty(); ++at)
      known[at] = (*recorded)[content.number_of(content.layout.leaves[at])];
  }
  return known;
}

void Engine::loaded(uint64_t number, LoadResult result) {
  loaded_bytes_ += result.counters.bytes;
  Replica& replica = *replicas_.at(number);
  if (LoadReport* report = report_of(number)) {
    note_progress(replica, *report);
    if (notes_.size() > kNoteCountMax) notes_.clear();
    for (const std::string& note : report->notes) {
      if (notes_.insert(note).second) log(LogLevel::info, "load ", report->load, ": ", note);
    }
    report->spans = std::move(result.spans);
  }
  replica.load.reset();
  replica.pages.reset();
  if (result.status) {
    uint64_t left_bytes = replica.content->layout.size_bytes;
    for (memory::Segment& segment : replica.memory.segments) {
      const uint64_t touched_bytes = std::min(left_bytes, segment.size_bytes());
      segment.set_touched(std::max(segment.touched_bytes(), touched_bytes));
      left_bytes -= touched_bytes;
    }
    replica.leaves = std::move(result.leaves);
    remember(replica);
  }
  end_load(replica, result.status.map([&] { return result.artifact_id; }));
  std::vector<uint64_t> copies;  // which hold it
  for (const auto& [at, other] : replicas_) {
    if (other->source == number) copies.push_back(at);
  }
  for (const uint64_t copy : copies) end_on_device(*replicas_.at(copy));
}

// All bytes of a replica are there and were checked, or never will be; it may be gone then.
void Engine::end_load(Replica& replica, const Result<tensor::Digest>& artifact) {
  replica.last_used_ns = base::monotonic_ns();
  if (artifact) {
    replica.state = ReplicaState::ready;
    replica.artifact = *artifact;
    tell_keeper_(replica.number, 0);  // before clients know: what they saw ready outlives this process
    replica.fill->end_ready(*artifact);
  } else {
    replica.state = ReplicaState::failed;
    replica.error = artifact.error();
    replica.fill->end_failed(artifact.error());
    unlist(replica);  // the next open tries again
  }
  if (LoadReport* report = report_of(replica.number)) {
    report->state = replica.state;
    report->artifact = replica.artifact;
    report->error = replica.error;
    log(LogLevel::info, "load ", report->load, ": ", artifact ? "ready" : artifact.error().message, ", ",
        base::human_bytes(report->counters.bytes), " in ", static_cast<double>(report->wall_ns) / 1e9, " s");
  }
  settle(replica);
}

// Says it once when the catalog begins to fail: the daemon serves without it.
void Engine::note_catalog(const Status& status) {
  if (!status && !catalog_failed_) {
    log(LogLevel::warning, "catalog: ", status.error().message,
        "; the digests of loads are not kept, later ones cannot be checked against them");
  }
  catalog_failed_ = !status;
}

// A record is of all leaves of a file: those of other tensors are kept, or are zeros until somebody reads them.
void Engine::remember(const Replica& replica) {
  const Content& content = *replica.content;
  if (!replica.stays && replica.checked) return;  // a batch that taught nothing
  std::vector<catalog::FileRecord> files;
  for (uint32_t file = 0; file < content.identities.size(); ++file) {
    const auto [first, last] = leaves_of_file(content, file);
    const FileLeaves& all = content.file_leaves[file];
    if (first == last || all.count == 0) continue;
    files.push_back({content.identities[file], content.index.files[file].path, all.layout_digest, {}});
    auto& leaves = files.back().leaves;
    leaves.resize(all.count);
    for (uint32_t at = first; at < last; ++at)
      leaves[content.number_of(content.layout.leaves[at])] = replica.leaves[at];
  }
  ++remembering_count_;
  catalog_thread_.post(this, [this, files = std::move(files)]() mutable {
    for (catalog::FileRecord& file : files) {
      if (std::none_of(file.leaves.begin(), file.leaves.end(), is_zero)) continue;
      const auto older =
          recorded_leaves(file.identity, {static_cast<uint32_t>(file.leaves.size()), file.layout_digest});
      for (size_t at = 0; older && at < older->size(); ++at) {
        if (is_zero(file.leaves[at])) file.leaves[at] = (*older)[at];
      }
    }
    note_catalog(catalog_.remember(files));
    owner_.post([this] {
      --remembering_count_;
      end_drain();
    });
  });
}

// ---- letting go ---------------------------------------------------------------------------------------------------

void Engine::settle(Replica& replica) {
  const bool used = replica.load || !replica.leases.empty() || replica.use_count > 0;
  if (!used && (replica.state == ReplicaState::failed || replica.doomed)) return forget(replica.number);
  room_changed();
  end_drain();
}

// Batches that nobody holds stay for those who stream the same, as long as anybody streams.
void Engine::drop_passing() {
  std::vector<uint64_t> passing;
  for (const auto& [number, replica] : replicas_) {
    for (const auto& [lease, held] : replica->leases) {
      if (held.brief) return;
    }
    if (!replica->stays && !replica->held() && !replica->doomed && replica->state != ReplicaState::failed)
      passing.push_back(number);
  }
  for (const uint64_t number : passing) CHECK(evict(number));
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
  if (replica.source != 0) let_go(replica.source);
  if (replica.fill) replica.fill->void_it();  // a keeper that still has it must not hand on what is overwritten
  pool_memory_.free(std::move(replica.memory));
  replicas_.erase(found);
  tell_keeper_(number, 0);
  if (auto surplus = pool_memory_.trim(); !surplus.empty()) give_back(std::move(surplus), [] {});
  room_changed();
  end_drain();
}

Status Engine::evict(uint64_t number) {
  Replica& replica = *replicas_.at(number);
  if (replica.pinned) return fail(Code::denied, "replica ", number, " ", replica.path(), " is pinned; unpin it first");
  if (!replica.leases.empty()) {
    const Holder& holder = replica.leases.begin()->second.holder;
    const std::string others =
        replica.leases.size() == 1 ? "" : base::text(" and ", replica.leases.size() - 1, " more");
    return fail(Code::denied, "replica ", number, " ", replica.path(), " is leased by ", holder.process_name, " pid ",
                holder.process_id, others, "; close it there first");
  }
  if (replica.state <= ReplicaState::waiting || replica.use_count > 0)
    return fail(Code::unavailable, "replica ", number, " ", replica.path(), " is busy; try again");
  if (replica.load) {
    replica.doomed = true;
    unlist(replica);
    cancel_load(replica, {Code::cancelled, base::text("load of ", replica.path(), ": evicted while it was filling")});
    return {};
  }
  forget(number);
  return {};
}

// Whoever waits hears of it at once; the load itself ends when the disk has given back what it was asked for.
void Engine::cancel_load(Replica& replica, base::Error reason) {
  replica.fill->end_failed(reason);
  replica.load->cancel(std::move(reason));
}

void Engine::want(uint64_t number, uint32_t first, uint32_t last) {
  auto found = replicas_.find(number);
  if (found != replicas_.end() && found->second->source != 0) found = replicas_.find(found->second->source);
  if (found != replicas_.end() && found->second->load) found->second->load->want(first, last);
}

void Engine::set_pinned(uint64_t number, bool pinned) {
  Replica& replica = *replicas_.at(number);
  replica.pinned = pinned;
  replica.stays = replica.stays || pinned;
  tell_keeper_(number, 0);
  room_changed();
}

void Engine::drain(std::function<void()> done) {
  draining_ = true;
  serve_line();  // nobody waits for others any more
  if (running_count() == 0) return done();
  drained_ = std::move(done);
}

void Engine::end_drain() {
  if (drained_ && running_count() == 0) std::exchange(drained_, nullptr)();
}

void Engine::cancel_all() {
  cancelling_ = true;
  serve_line();
  for (auto& [number, replica] : replicas_) {
    if (replica->load) {
      cancel_load(*replica, {Code::cancelled, base::text("load of ", replica->path(), ": the daemon was stopped")});
    }
  }
}

size_t Engine::running_count() const {
  const auto busy = std::count_if(replicas_.begin(), replicas_.end(), [](const auto& entry) {
    return entry.second->state <= ReplicaState::filling || entry.second->use_count > 0;
  });
  return static_cast<size_t>(busy) + remembering_count_ + (leaving_bytes_ > 0 ? 1 : 0);
}

}  // namespace tensord::engine
