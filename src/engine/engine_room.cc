// Room, in memory and in descriptors: who waits for it, what goes to make it, who is turned away.
//
//   line    [replica 7: 30 GiB][replica 9: 2 GiB][replica 10: 40 GiB]     first come, first served
//           keeps waiting       may pass: 30 + 2 fit   may not: 30 + 40 do not
//
// Streamed batches stand in the same line. A client that holds a batch never waits for another (Stay::batch_ahead), so
// whatever a batch holds comes back, and no two of them wait for each other.
#include <algorithm>
#include <iterator>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/text.h"
#include "engine/engine.h"

namespace tensord::engine {

using base::Code;
using base::log;
using base::LogLevel;

namespace {

// How long what the engine itself is giving back may take: a cancelled read takes as long as its disk.
constexpr int64_t kFreeingNs = 30'000'000'000;

uint64_t missing(uint64_t wanted, uint64_t most) { return wanted > most ? wanted - most : 0; }

uint64_t memory_bytes_of(const Replica& replica) { return memory::memory_bytes(replica.content->image_bytes); }

// Replica::descriptor_count() once it fills.
size_t descriptors_of(const Replica& replica) {
  return 2 + memory::segment_sizes(replica.content->image_bytes).size() + replica.key.files.size();
}

}  // namespace

// ---- the line -------------------------------------------------------------------------------------------------------

// Something was let go, or the limit has changed.
void Engine::room_changed() {
  const bool over = pool_memory_.in_use_bytes() + pool_memory_.kept_bytes() > pool_memory_.limit_bytes();
  if (room_changed_ || (line_.empty() && !over)) return;
  room_changed_ = true;
  owner_.post([this] {
    room_changed_ = false;
    shrink();
    serve_line();
  });
}

void Engine::serve_line() {
  const uint64_t limit_bytes = pool_memory_.limit_bytes();
  Room ahead = Room::now;                   // how it is with those that keep waiting
  uint64_t passing_bytes_max = UINT64_MAX;  // what fits beside each of them
  uint64_t passed = 0;
  for (InLine& entry : std::exchange(line_, {})) {
    Replica& replica = *replicas_.at(entry.replica);
    if (cancelling_) {
      fail_waiters(replica, {Code::cancelled, base::text("open ", replica.path(), ": the daemon was stopped")});
      continue;
    }
    if (Replica* larger = covering(replica)) {
      hand_over(replica, *larger);
      continue;
    }
    const uint64_t needed_bytes = memory_bytes_of(replica);
    // What was over the limit when it was indexed has no layout.
    const bool laid_out = replica.content->layout.size_bytes == replica.content->image_bytes;
    if (needed_bytes > limit_bytes || !laid_out) {
      decline(replica, needed_bytes);
      continue;
    }
    const Room room = needed_bytes <= passing_bytes_max ? make_room(replica) : ahead;
    if (room == Room::now) {
      admit(replica, std::move(entry.known));
      continue;
    }
    replica.waits_for =
        base::text(base::human_bytes(needed_bytes), room == Room::freeing ? " that are being given back"
                                                    : ahead == Room::now  ? "; held: " + holders_text()
                                                                          : ", after others that wait for memory");
    if (!turn_away(replica, room)) continue;
    if (ahead == Room::now) passed = passed_bytes(entry.first_load);
    ahead = room;
    passing_bytes_max =
        room == Room::freeing ? 0 : std::min(passing_bytes_max, missing(limit_bytes, needed_bytes + passed));
    line_.push_back(std::move(entry));
  }
  look_again();
}

void Engine::admit(Replica& replica, Digests known) {
  const Status begun = begin_load(replica, std::move(known));
  if (!begun) return fail_waiters(replica, begun.error());
  line_moved_ns_ = base::monotonic_ns();
  for (const Waiter& waiter : std::exchange(replica.waiters, {})) waiter.done(grant(replica, waiter));
}

// Refuses those of its waiters to whom room does not come, or not in time; false when nobody is left.
bool Engine::turn_away(Replica& replica, Room room) {
  const int64_t now_ns = base::monotonic_ns();
  const auto waits_on = [&](const Waiter& waiter) {
    const int64_t until_ns = patient_until_ns(replica, waiter);
    if (room == Room::freeing) return now_ns < until_ns + kFreeingNs;
    return waiter.stay != Stay::batch_ahead && now_ns < until_ns && !draining_ && can_come(replica, waiter);
  };
  const auto refused = std::stable_partition(replica.waiters.begin(), replica.waiters.end(), waits_on);
  if (refused == replica.waiters.end()) return true;
  const base::Error error = refusal(replica);
  const auto asks_again = [](const Waiter& waiter) { return waiter.stay == Stay::batch_ahead; };
  if (!std::all_of(refused, replica.waiters.end(), asks_again)) {
    log(LogLevel::warning, error.message);
    keep_failed(replica, error);
  }
  const std::vector<Waiter> gone(std::make_move_iterator(refused), std::make_move_iterator(replica.waiters.end()));
  replica.waiters.erase(refused, replica.waiters.end());
  for (const Waiter& waiter : gone) waiter.done(tl::unexpected(error));
  if (!replica.waiters.empty()) return true;
  forget(replica.number);
  return false;
}

int64_t Engine::patient_until_ns(const Replica& replica, const Waiter& waiter) const {
  int64_t since_ns = std::max(waiter.asked_ns, replica.room_ns);
  // A stream is in line again with every batch: it gives up when nothing moves, not when many take turns.
  if (waiter.stay == Stay::batch) since_ns = std::max(since_ns, line_moved_ns_);
  return since_ns + waiter.patience_ns;
}

// A process that waits here lets go of nothing meanwhile, but for batches, which its other threads copy.
bool Engine::can_come(const Replica& replica, const Waiter& waiter) const {
  uint64_t bytes = memory_bytes_of(replica);
  size_t count = descriptors_of(replica);
  for (const auto& [number, other] : replicas_) {
    if (!other->pinned && !other->is_held_by(waiter.holder.process_id)) continue;
    bytes += other->memory.size_bytes();
    count += other->descriptor_count();
  }
  return bytes <= pool_memory_.limit_bytes() && count <= options_.descriptor_count_max;
}

// What began to load after the first in line had come, and is held.
uint64_t Engine::passed_bytes(uint64_t first_load) const {
  uint64_t bytes = 0;
  for (const auto& [number, replica] : replicas_) {
    if (replica->load_number >= first_load && replica->held()) bytes += replica->memory.size_bytes();
  }
  return bytes;
}

// Time passes though nothing else happens: somebody's patience may have ended.
void Engine::look_again() {
  constexpr int64_t kLookMs = 100;
  if (line_.empty() || std::exchange(looks_again_, true)) return;
  owner_.call_after(kLookMs, [this] {
    looks_again_ = false;
    serve_line();
  });
}

void Engine::withdraw(uint64_t asker) {
  const auto asked = [&](const Waiter& waiter) { return waiter.holder.asker == asker; };
  for (auto& [number, replica] : replicas_) std::erase_if(replica->waiters, asked);
  std::vector<uint64_t> unwanted;
  std::erase_if(line_, [&](const InLine& entry) {
    if (!replicas_.at(entry.replica)->waiters.empty()) return false;
    unwanted.push_back(entry.replica);
    return true;
  });
  for (const uint64_t number : unwanted) forget(number);
}

// What there is too little of for a replica.
std::string Engine::lack(const Replica& replica) const {
  const std::string& device = replica.key.device;
  if (!device.empty() && options_.device_memory_bytes == 0) return "the device has no room left";
  if (!device.empty())
    return base::text("gpu_memory is ", base::human_bytes(options_.device_memory_bytes), " and ",
                      base::human_bytes(used_on(device) - replica.device_bytes), " are in use");
  const uint64_t free_bytes = pool_memory_.free_bytes();
  if (memory_bytes_of(replica) > free_bytes)
    return base::text("of host_memory ", base::human_bytes(pool_memory_.limit_bytes()), " only ",
                      base::human_bytes(free_bytes), " are free");
  return base::text("others wait before it, or ", descriptor_count(), " of ", options_.descriptor_count_max,
                    " descriptors are in use (half of ulimit -n)");
}

base::Error Engine::refusal(const Replica& replica) const {
  const bool on_host = replica.key.device.empty();
  const std::string held = holders_text(replica.key.device);
  const int64_t waited_ms = (base::monotonic_ns() - replica.room_ns) / base::kNsPerMs;
  return {Code::exhausted,
          base::text("open ", replica.path(), on_host ? "" : " on " + replica.key.device, ": it needs ",
                     base::human_bytes(on_host ? memory_bytes_of(replica) : replica.device_bytes), ", but ",
                     lack(replica), ", and the rest cannot be evicted", held.empty() ? "" : ": " + held, " (waited ",
                     waited_ms, " ms); close or unpin some of them, or ",
                     on_host ? "raise host_memory" : "end others that use the device, or raise gpu_memory")};
}

// ---- making room ----------------------------------------------------------------------------------------------------

std::vector<EvictionCandidate> Engine::candidates(const std::string& device) const {
  std::vector<EvictionCandidate> all;
  for (const auto& [number, replica] : replicas_) {
    if (replica->key.device != device) continue;
    all.push_back({number, replica->memory_bytes(), replica->descriptor_count(), replica->last_used_ns, replica->held(),
                   replica->stays});
  }
  return all;
}

// By replicas on a device, those included for which there is no memory yet.
uint64_t Engine::used_on(const std::string& device) const {
  uint64_t bytes = 0;
  for (const auto& one : candidates(device)) bytes += one.memory_bytes;
  return bytes;
}

size_t Engine::descriptor_count() const {
  size_t count = 0;
  for (const auto& [number, replica] : replicas_) count += replica->descriptor_count();
  return count;
}

Engine::Room Engine::make_room(const Replica& replica) {
  const uint64_t needed_bytes =
      missing(pool_memory_.in_use_bytes() + memory_bytes_of(replica), pool_memory_.limit_bytes());
  const size_t needed_descriptors =
      missing(descriptor_count() + descriptors_of(replica), options_.descriptor_count_max);
  // While anything leaves, nobody comes: what is counted free may still have its pages.
  if (leaving_bytes_ > 0 || (needed_bytes > 0 && claimed_bytes_ > 0)) return Room::freeing;
  if (needed_bytes == 0 && needed_descriptors == 0) return Room::now;
  const auto victims = choose_victims(candidates(), needed_bytes, needed_descriptors);
  if (!victims) return Room::held;
  const bool at_once = std::none_of(victims->begin(), victims->end(),
                                    [&](uint64_t victim) { return replicas_.at(victim)->abandoned(); });
  evict_all(*victims, "to make room");
  return at_once ? Room::now : Room::freeing;
}

void Engine::evict_all(const std::vector<uint64_t>& victims, const char* why) {
  for (const uint64_t victim : victims) {
    if (replicas_.at(victim)->doomed) continue;  // it is on its way already
    log(LogLevel::info, "evict replica ", victim, " (", replicas_.at(victim)->path(), ") ", why);
    CHECK(evict(victim));
  }
}

// Memory goes back to the kernel on a pool thread: unmapping takes long.
void Engine::give_back(std::vector<memory::Segment> surplus, std::function<void()> then) {
  if (surplus.empty()) return owner_.post(std::move(then));
  uint64_t bytes = 0;
  for (const memory::Segment& segment : surplus) bytes += segment.size_bytes();
  leaving_bytes_ += bytes;
  auto shared = std::make_shared<std::vector<memory::Segment>>(std::move(surplus));
  pool_.post(this, [this, shared, bytes, then = std::move(then)] {
    shared->clear();
    owner_.post([this, bytes, then] {
      leaving_bytes_ -= bytes;
      then();
      room_changed();
      end_drain();
    });
  });
}

// Over the limit, what nobody holds goes.
void Engine::shrink() {
  const uint64_t over_bytes = missing(pool_memory_.in_use_bytes(), pool_memory_.limit_bytes());
  evict_all(choose_as_many(candidates(), over_bytes), "to stay below the limit");
  if (auto surplus = pool_memory_.trim(); !surplus.empty()) give_back(std::move(surplus), [] {});
}

void Engine::set_host_memory(uint64_t limit_bytes) {
  const uint64_t before_bytes = pool_memory_.limit_bytes();
  if (limit_bytes == before_bytes) return;
  pool_memory_.set_limit(limit_bytes);
  shrink();
  const uint64_t in_use_bytes = pool_memory_.in_use_bytes();
  log(LogLevel::warning, "host_memory is now ", base::human_bytes(limit_bytes), ", it was ",
      base::human_bytes(before_bytes), ": the memory limit of the cgroup or the machine has changed",
      in_use_bytes <= limit_bytes ? ""
                                  : base::text("; ", base::human_bytes(in_use_bytes),
                                               " are in use and stay until they are let go: ", holders_text()));
  room_changed();
}

bool Engine::claim_memory(uint64_t size_bytes) {
  if (!line_.empty() || leaving_bytes_ > 0 || !pool_memory_.claim(size_bytes)) return false;
  claimed_bytes_ += size_bytes;
  return true;
}

void Engine::settle_claim(uint64_t size_bytes, std::optional<memory::Segment> segment) {
  claimed_bytes_ -= size_bytes;
  pool_memory_.settle_claim(size_bytes, std::move(segment));
  room_changed();
}

std::string Engine::holders_text(const std::string& device) const {
  constexpr size_t kShownMax = 8;
  std::string out;
  size_t shown = 0;
  for (const auto& [number, replica] : replicas_) {
    if (replica->key.device != device || !replica->held() || replica->memory_bytes() == 0) continue;
    if (shown++ == kShownMax) return out + ", and others";
    if (!out.empty()) out += ", ";
    out += base::text("replica ", number, " ", replica->path(), " (", base::human_bytes(replica->memory_bytes()));
    if (replica->pinned) out += ", pinned";
    if (replica->state == ReplicaState::filling) out += ", filling";
    for (const auto& [lease, held] : replica->leases) {
      out += base::text(", leased by ", held.holder.process_name, " pid ", held.holder.process_id);
    }
    out += ")";
  }
  return out;
}

}  // namespace tensord::engine
