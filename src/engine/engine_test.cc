#include "engine/engine.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <fstream>
#include <mutex>
#include <random>

#include "catalog/memory_catalog.h"

namespace tensord::engine {

namespace {

using base::Code;

// The owner's thread of a test: the test itself, which runs posted work until something has come true.
class TestOwner {
 public:
  Owner owner() {
    return {.post = [this](std::function<void()> work) { post(std::move(work)); },
            .watch_hangup =
                [this](int fd, std::function<void()> gone) {
                  hangups_[fd] = std::move(gone);
                  return Status();
                },
            .unwatch = [this](int fd) { hangups_.erase(fd); },
            .call_after =
                [this](int64_t delay_ms, std::function<void()> work) {
                  timers_.emplace(Clock::now() + std::chrono::milliseconds(delay_ms), std::move(work));
                }};
  }

  void post(std::function<void()> work) {
    std::unique_lock lock(mutex_);
    posted_.push_back(std::move(work));
    changed_.notify_one();
  }

  void run_until(const std::function<bool()>& reached) {
    while (!reached()) run_one();
  }

  // Waits for work, or for a timer, and runs it.
  void run_one() {
    std::function<void()> work;
    {
      std::unique_lock lock(mutex_);
      while (posted_.empty() && !is_due()) {
        if (timers_.empty()) {
          changed_.wait(lock);
        } else {
          changed_.wait_until(lock, timers_.begin()->first);
        }
      }
      if (posted_.empty()) {
        work = std::move(timers_.extract(timers_.begin()).mapped());
      } else {
        work = std::move(posted_.front());
        posted_.pop_front();
      }
    }
    work();
  }

  void run_for(size_t count) {
    while (count-- > 0) {
      post([] {});  // so that there is something
      run_one();
    }
  }

  void hang_up(int fd) { std::function<void()>(hangups_.at(fd))(); }
  void hang_up_all() {
    while (!hangups_.empty()) hang_up(hangups_.begin()->first);
  }

 private:
  using Clock = std::chrono::steady_clock;
  bool is_due() const { return !timers_.empty() && timers_.begin()->first <= Clock::now(); }

  std::multimap<Clock::time_point, std::function<void()>> timers_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> posted_;
  std::map<int, std::function<void()>> hangups_;
};

class EngineTest : public testing::Test {
 protected:
  explicit EngineTest(int64_t memory_wait_ms = 0)
      : catalog_thread_(storage::start_read_pool(1).value()),
        pool_(storage::start_read_pool(2).value()),
        engine_({.host_memory_bytes = 8 << 20,
                 .encode_index = [](const tensor::Index&) { return Result<IndexFile>(IndexFile{}); },
                 .memory_wait_ms = memory_wait_ms,
                 .descriptor_count_max = 32},
                *catalog_, *catalog_thread_, *pool_, owner_.owner()) {
    std::string name = "/tmp/tensord-engine-test-XXXXXX";
    folder_ = ::mkdtemp(name.data());
  }
  ~EngineTest() override {
    owner_.run_until([&] { return engine_.running_count() == 0; });
    std::system(("rm -rf " + folder_).c_str());
  }

  // A file with U8 tensors of `size_bytes` pseudo-random bytes each: one, "w", or several, "w0", "w1", ...
  std::string write(const std::string& name, size_t size_bytes, unsigned seed = 1, int count = 1) {
    const std::string path = folder_ + "/" + name;
    std::string header = "{";
    for (int at = 0; at < count; ++at) {
      const std::string tensor = count == 1 ? "w" : "w" + std::to_string(at);
      header += (at == 0 ? "\"" : ",\"") + tensor + R"(":{"dtype":"U8","shape":[)" +
                std::to_string(size_bytes) + R"(],"data_offsets":[)" + std::to_string(at * size_bytes) + "," +
                std::to_string((at + 1) * size_bytes) + "]}";
    }
    header += "}";
    std::mt19937 random(seed);
    std::string bytes(size_bytes * static_cast<size_t>(count), '\0');
    for (char& byte : bytes) byte = static_cast<char>(random());
    const uint64_t header_bytes = header.size();
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(&header_bytes), 8);
    file << header << bytes;
    return path;
  }

  OpenOrder order(const std::string& path, bool index_only = false) {
    OpenOrder order{.path = path, .index_only = index_only, .holder = {77, 0, "test"}};
    base::Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    const base::FileIdentity identity = base::identify_file(fd.get(), path).value();
    order.files.push_back({std::move(fd), path, identity});
    return order;
  }

  Result<Grant> open(const std::string& path, bool index_only = false) {
    std::optional<Result<Grant>> granted;
    engine_.open(order(path, index_only), [&](Result<Grant> grant) { granted = std::move(grant); });
    owner_.run_until([&] { return granted.has_value(); });
    return std::move(*granted);
  }

  Result<Grant> load(const std::string& path) {
    Result<Grant> granted = open(path);
    owner_.run_until([&] { return engine_.running_count() == 0; });
    return granted;
  }

  using Granted = std::shared_ptr<std::optional<Result<Grant>>>;
  // Asks what may be answered later.
  Granted ask(OpenOrder order) {
    auto granted = std::make_shared<std::optional<Result<Grant>>>();
    engine_.open(std::move(order), [granted](Result<Grant> grant) { *granted = std::move(grant); });
    return granted;
  }
  Granted ask(const std::string& path, pid_t process_id, uint64_t asker = 0) {
    OpenOrder asked = order(path);
    asked.holder.process_id = process_id;
    asked.holder.asker = asker;
    return ask(std::move(asked));
  }
  Granted ask_batch(const std::string& path, const std::string& only, Stay stay, pid_t process_id) {
    OpenOrder asked = order(path);
    asked.only = {only};
    asked.stay = stay;
    asked.holder.process_id = process_id;
    return ask(std::move(asked));
  }
  // What it was answered.
  Result<Grant>& answer(const Granted& granted) {
    owner_.run_until([&] { return granted->has_value(); });
    return **granted;
  }
  uint64_t replica_of(const Granted& granted) { return answer(granted).value().replica; }
  void run_until_waiting(size_t count) {
    owner_.run_until([&] { return engine_.waiting_count() == count; });
  }
  void run_until_idle() {
    owner_.run_until([&] { return engine_.running_count() == engine_.waiting_count(); });
  }
  void let_go(uint64_t replica) {
    std::vector<int> fds;
    for (const auto& [number, lease] : engine_.replica(replica).leases) fds.push_back(lease.read_end.get());
    for (const int fd : fds) owner_.hang_up(fd);
  }

  TestOwner owner_;
  std::unique_ptr<catalog::MemoryCatalog> catalog_ = catalog::make_memory_catalog();
  std::unique_ptr<storage::ReadPool> catalog_thread_;
  std::unique_ptr<storage::ReadPool> pool_;
  Engine engine_;
  std::string folder_;
};

}  // namespace

TEST_F(EngineTest, a_load_ends_ready_with_an_artifact_id_and_a_report) {
  const Grant grant = load(write("a", 100'000)).value();
  const Replica& replica = engine_.replica(grant.replica);
  EXPECT_EQ(replica.state, ReplicaState::ready);
  EXPECT_TRUE(replica.artifact.has_value());
  const LoadReport report = engine_.load_report(grant.replica).value();
  EXPECT_EQ(report.state, LoadState::ready);
  EXPECT_EQ(report.counters.bytes, engine_.replica(grant.replica).content->identities[0].size_bytes);
  EXPECT_FALSE(report.checked_against_record);
}

TEST_F(EngineTest, two_requests_for_the_same_files_share_one_replica_and_one_load) {
  const std::string path = write("a", 100'000);
  std::vector<uint64_t> replicas;
  for (int client = 0; client < 3; ++client) {
    engine_.open(order(path), [&](Result<Grant> grant) { replicas.push_back(grant.value().replica); });
  }
  owner_.run_until([&] { return replicas.size() == 3 && engine_.running_count() == 0; });
  EXPECT_EQ(replicas[0], replicas[1]);
  EXPECT_EQ(replicas[1], replicas[2]);
  EXPECT_EQ(engine_.replica(replicas[0]).leases.size(), 3u);
  EXPECT_EQ(engine_.last_load_report()->load, 1u);
}

TEST_F(EngineTest, a_file_that_changed_since_last_time_becomes_another_artifact) {
  const std::string path = write("a", 100'000, 1);
  const uint64_t before = load(path).value().replica;
  write("a", 100'000, 2);
  const timespec times[2] = {{0, UTIME_OMIT}, {12345, 0}};
  ::utimensat(AT_FDCWD, path.c_str(), times, 0);
  const uint64_t after = load(path).value().replica;
  EXPECT_NE(before, after);
  EXPECT_NE(engine_.replica(before).artifact, engine_.replica(after).artifact);
  EXPECT_EQ(engine_.find(path).value(), after);
}

TEST_F(EngineTest, a_second_load_is_checked_against_the_first) {
  const std::string path = write("a", 100'000);
  const uint64_t first = load(path).value().replica;
  owner_.hang_up_all();
  ASSERT_TRUE(engine_.evict(first));
  EXPECT_TRUE(engine_.load_report(load(path).value().replica)->checked_against_record);
}

TEST_F(EngineTest, bytes_that_changed_behind_an_unchanged_mtime_fail_the_load) {
  const std::string path = write("a", 100'000);
  struct stat before;
  ::stat(path.c_str(), &before);
  const uint64_t first = load(path).value().replica;
  owner_.hang_up_all();
  ASSERT_TRUE(engine_.evict(first));
  const base::Fd fd(::open(path.c_str(), O_WRONLY));
  ASSERT_EQ(::pwrite(fd.get(), "changed", 7, 50'000), 7);
  const timespec times[2] = {before.st_atim, before.st_mtim};
  ::futimens(fd.get(), times);
  const Grant grant = load(path).value();
  const Replica& replica = engine_.replica(grant.replica);
  EXPECT_EQ(replica.state, ReplicaState::failed);
  EXPECT_EQ(replica.error->code, Code::corrupt);
  EXPECT_NE(replica.error->message.find(path + ": tensor 'w', leaf 0"), std::string::npos)
      << replica.error->message;
}

TEST_F(EngineTest, least_recently_used_replicas_make_room_for_others) {
  const uint64_t first = load(write("a", 3 << 20)).value().replica;
  const uint64_t second = load(write("b", 3 << 20)).value().replica;
  owner_.hang_up_all();
  const uint64_t third = load(write("c", 3 << 20)).value().replica;
  EXPECT_FALSE(engine_.replicas().contains(first));
  EXPECT_TRUE(engine_.replicas().contains(second));
  EXPECT_TRUE(engine_.replicas().contains(third));
  EXPECT_LE(engine_.memory().in_use_bytes() + engine_.memory().kept_bytes(), engine_.memory().limit_bytes());
}

TEST_F(EngineTest, a_refusal_names_what_holds_the_memory) {
  const std::string path = write("a", 5 << 20);
  const Grant held = load(path).value();
  engine_.set_pinned(held.replica, true);
  const Result<Grant> refused = open(write("b", 5 << 20));
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, Code::exhausted);
  EXPECT_NE(refused.error().message.find("replica 1 " + path + " (5.12 MiB, pinned, leased by test pid 77)"),
            std::string::npos)
      << refused.error().message;
  EXPECT_EQ(engine_.replica(held.replica).state, ReplicaState::ready);
}

TEST_F(EngineTest, a_load_whose_clients_are_gone_gives_way_to_one_that_is_wanted) {
  const uint64_t abandoned = open(write("a", 5 << 20)).value().replica;
  owner_.hang_up_all();
  const uint64_t wanted = load(write("b", 5 << 20)).value().replica;
  EXPECT_FALSE(engine_.replicas().contains(abandoned));
  EXPECT_EQ(engine_.replica(wanted).state, ReplicaState::ready);
}

TEST_F(EngineTest, what_was_evicted_while_it_was_filling_is_loaded_anew_by_the_next_open) {
  const std::string path = write("a", 1 << 20);
  const uint64_t evicted = open(path).value().replica;
  EXPECT_EQ(engine_.replica(evicted).state, ReplicaState::filling);
  owner_.hang_up_all();
  ASSERT_TRUE(engine_.evict(evicted));
  const uint64_t anew = load(path).value().replica;
  EXPECT_NE(anew, evicted);
  EXPECT_EQ(engine_.replica(anew).state, ReplicaState::ready);
  EXPECT_FALSE(engine_.replicas().contains(evicted));
}

TEST_F(EngineTest, a_load_waits_for_memory_that_is_being_pre_faulted) {
  ASSERT_TRUE(engine_.claim_memory(4 << 20));
  std::optional<Result<Grant>> granted;
  engine_.open(order(write("a", 6 << 20)), [&](Result<Grant> grant) { granted = std::move(grant); });
  // The catalog's thread comes after the index: once it is through, the request has been looked at.
  bool looked_at = false;
  while (!looked_at) {
    looked_at = !engine_.claim_memory(256 << 10);
    if (!looked_at) engine_.settle_claim(256 << 10, std::nullopt);
    if (!looked_at) owner_.run_one();
  }
  EXPECT_FALSE(granted);
  engine_.settle_claim(4 << 20, memory::make_segment(4 << 20, 0).value());
  owner_.run_until([&] { return granted.has_value(); });
  EXPECT_TRUE(*granted);
}

TEST_F(EngineTest, a_stopped_daemon_begins_no_load_that_was_still_being_indexed) {
  std::optional<Result<Grant>> granted;
  engine_.open(order(write("a", 1000)), [&](Result<Grant> grant) { granted = std::move(grant); });
  engine_.cancel_all();
  owner_.run_until([&] { return granted.has_value(); });
  EXPECT_EQ(granted->error().code, Code::cancelled);
  EXPECT_EQ(engine_.running_count(), 0u);
}

TEST_F(EngineTest, a_replica_is_found_by_every_name_it_was_opened_by) {
  const std::string path = write("a", 1000);
  const std::string link = folder_ + "/link";
  ASSERT_EQ(::symlink(path.c_str(), link.c_str()), 0);
  const uint64_t replica = load(path).value().replica;
  EXPECT_EQ(load(link).value().replica, replica);
  EXPECT_EQ(engine_.find(link).value(), replica);
}

TEST_F(EngineTest, of_an_artifact_above_the_limit_the_index_is_granted) {
  const std::string path = write("a", 9 << 20);
  for (const bool index_only : {false, true}) {
    const Grant index = open(path, index_only).value();
    EXPECT_EQ(index.content->index.tensors.size(), 1u);
    EXPECT_EQ(index.fill_map_fd, -1);
    EXPECT_EQ(index.batch_bytes, 2u << 20);
  }
  OpenOrder batch = order(path);
  batch.stay = Stay::batch;
  std::optional<Result<Grant>> refused;
  engine_.open(std::move(batch), [&](Result<Grant> grant) { refused = std::move(grant); });
  owner_.run_until([&] { return refused.has_value(); });
  EXPECT_EQ(refused->error().code, Code::exhausted);
  EXPECT_NE(refused->error().message.find("raise host_memory"), std::string::npos);
  EXPECT_TRUE(engine_.replicas().empty());
}

TEST_F(EngineTest, leased_and_pinned_replicas_are_not_evicted_on_request) {
  const uint64_t replica = load(write("a", 1000)).value().replica;
  EXPECT_EQ(engine_.evict(replica).error().code, Code::denied);
  owner_.hang_up_all();
  engine_.set_pinned(replica, true);
  EXPECT_EQ(engine_.evict(replica).error().code, Code::denied);
  engine_.set_pinned(replica, false);
  EXPECT_TRUE(engine_.evict(replica));
  EXPECT_EQ(engine_.find(std::to_string(replica)).error().code, Code::not_found);
}

TEST_F(EngineTest, selectors_are_paths_ids_numbers_and_last) {
  const std::string path = write("a", 1000);
  const uint64_t replica = load(path).value().replica;
  const std::string id = engine_.replica(replica).artifact->to_text();
  for (const std::string& selector :
       {path, id, id.substr(0, 4), std::to_string(replica), std::string("last")}) {
    EXPECT_EQ(engine_.find(selector).value(), replica) << selector;
  }
  for (const std::string& selector : {std::string(""), id.substr(0, 3), path + "x", std::string("999")}) {
    EXPECT_EQ(engine_.find(selector).error().code, Code::not_found) << selector;
  }
}

TEST_F(EngineTest, another_uid_is_not_granted_what_this_one_opened) {
  const std::string path = write("a", 1000);
  load(path).value();
  OpenOrder stranger = order(path);
  stranger.holder.user_id = 12345;
  std::optional<Result<Grant>> granted;
  engine_.open(std::move(stranger), [&](Result<Grant> grant) { granted = std::move(grant); });
  EXPECT_EQ(granted->error().code, Code::denied);
}

TEST_F(EngineTest, verify_finds_a_damaged_leaf_and_names_it) {
  const std::string path = write("a", 3 << 20);
  const Grant grant = load(path).value();
  const auto verify = [&] {
    std::optional<Result<VerifyReport>> report;
    engine_.verify(grant.replica, [&](Result<VerifyReport> done) { report = std::move(done); });
    owner_.run_until([&] { return report.has_value(); });
    return std::move(*report).value();
  };
  EXPECT_TRUE(verify().faults.empty());
  const Replica& replica = engine_.replica(grant.replica);
  const tensor::Tensor& tensor = replica.content->index.tensors[0];
  replica.memory.data()[tensor.offset + (2 << 20) + 17] ^= std::byte{4};
  const VerifyReport damaged = verify();
  ASSERT_EQ(damaged.faults.size(), 1u);
  EXPECT_EQ(damaged.faults[0].file, path);
  EXPECT_EQ(damaged.faults[0].tensor, "w");
  EXPECT_EQ(damaged.faults[0].leaf, 2u);
  EXPECT_EQ(damaged.faults[0].offset, tensor.offset + (2 << 20));
}

TEST_F(EngineTest, a_catalog_that_fails_does_not_fail_the_load) {
  catalog_->set_fault(base::Error{Code::exhausted, "disk full"});
  EXPECT_EQ(engine_.replica(load(write("a", 1000)).value().replica).state, ReplicaState::ready);
}

TEST_F(EngineTest, a_broken_header_is_told_to_everyone_who_waits_and_leaves_nothing) {
  const std::string path = folder_ + "/broken";
  std::ofstream(path) << "\x10garbage that is no header";
  int refused = 0;
  for (int client = 0; client < 2; ++client) {
    engine_.open(order(path), [&](Result<Grant> grant) { refused += grant.error().code == Code::corrupt; });
  }
  owner_.run_until([&] { return refused == 2; });
  EXPECT_TRUE(engine_.replicas().empty());
}

TEST_F(EngineTest, draining_refuses_new_loads_and_ends_when_none_runs) {
  const std::string path = write("a", 1000);
  bool drained = false;
  engine_.open(order(path), [](Result<Grant>) {});
  engine_.drain([&] { drained = true; });
  owner_.run_until([&] { return drained; });
  EXPECT_EQ(engine_.running_count(), 0u);
  std::optional<Result<Grant>> refused;
  engine_.open(order(path), [&](Result<Grant> grant) { refused = std::move(grant); });
  EXPECT_EQ(refused->error().code, Code::unavailable);
}

// ---- waiting for room -----------------------------------------------------------------------------------------------

namespace {
constexpr size_t kMiB = 1 << 20;
class LineTest : public EngineTest {
 protected:
  LineTest() : EngineTest(600'000) {}
};
class ImpatientTest : public EngineTest {
 protected:
  ImpatientTest() : EngineTest(30) {}
};
}  // namespace

TEST_F(LineTest, an_open_waits_until_a_lease_ends) {
  const std::string path = write("a", 5 * kMiB);
  load(path).value();
  const Granted waiting = ask(write("b", 5 * kMiB), 88);
  run_until_waiting(1);
  const Replica& replica = engine_.replica(2);
  EXPECT_EQ(replica.state, ReplicaState::waiting);
  EXPECT_NE(replica.waits_for.find("5.12 MiB; held: replica 1 " + path), std::string::npos)
      << replica.waits_for;
  EXPECT_FALSE(engine_.claim_memory(kMiB)) << "who waits comes before memory for loads to come";
  owner_.hang_up_all();
  EXPECT_EQ(replica_of(waiting), 2u);
  EXPECT_FALSE(engine_.replicas().contains(1));
}

TEST_F(LineTest, how_long_it_waited_is_in_the_report) {
  const uint64_t held = load(write("a", 5 * kMiB)).value().replica;
  const Granted waiting = ask(write("b", 5 * kMiB), 88);
  run_until_waiting(1);
  ::usleep(2000);
  const LoadReport before = engine_.load_report(2).value();
  EXPECT_EQ(before.state, LoadState::waiting);
  EXPECT_GE(before.memory_ns, 2'000'000);
  let_go(held);
  answer(waiting).value();
  run_until_idle();
  const LoadReport after = engine_.load_report(2).value();
  EXPECT_EQ(after.state, LoadState::ready);
  EXPECT_GE(after.memory_ns, before.memory_ns);
  EXPECT_GE(after.wall_ns, after.memory_ns);
}

TEST_F(LineTest, what_waiting_cannot_help_is_refused_at_once) {
  load(write("a", 5 * kMiB)).value();
  EXPECT_EQ(open(write("b", 5 * kMiB)).error().code, Code::exhausted) << "its own process holds the memory";
  engine_.set_pinned(1, true);
  const Granted other = ask(write("d", 5 * kMiB), 88);
  EXPECT_EQ(answer(other).error().code, Code::exhausted);
  EXPECT_EQ(engine_.waiting_count(), 0u);
}

TEST_F(LineTest, an_open_can_have_a_patience_of_its_own) {
  load(write("a", 5 * kMiB)).value();
  OpenOrder impatient = order(write("b", 5 * kMiB));
  impatient.holder.process_id = 88;
  impatient.memory_wait_ms = 0;
  EXPECT_EQ(answer(ask(std::move(impatient))).error().code, Code::exhausted);
}

TEST_F(LineTest, a_later_one_passes_only_where_it_fits_beside_those_before_it) {
  const uint64_t held = load(write("a", 5 * kMiB)).value().replica;
  const Granted large = ask(write("b", 6 * kMiB), 88);
  run_until_waiting(1);
  const Granted beside = ask(write("c", 3 * kMiB / 2), 99);
  EXPECT_TRUE(answer(beside)) << "6 and 1.5 MiB fit 8";
  const Granted behind = ask(write("d", kMiB), 99);
  run_until_waiting(2);
  run_until_idle();
  EXPECT_FALSE(*behind) << "there is room for it now, but not beside 6 and 1.5 MiB";
  let_go(held);
  EXPECT_TRUE(answer(large)) << "those that passed are not in its way";
  EXPECT_FALSE(*behind);
  owner_.hang_up_all();
  EXPECT_TRUE(answer(behind));
}

TEST_F(LineTest, what_is_resident_is_granted_past_all_who_wait) {
  const std::string path = write("a", 5 * kMiB);
  load(path).value();
  const Granted waiting = ask(write("b", 7 * kMiB), 88);
  run_until_waiting(1);
  EXPECT_TRUE(answer(ask(path, 99)));
  owner_.hang_up_all();
  EXPECT_TRUE(answer(waiting));
}

TEST_F(LineTest, who_asks_for_what_waits_already_waits_with_it) {
  load(write("a", 5 * kMiB)).value();
  const std::string path = write("b", 5 * kMiB);
  const Granted first = ask(path, 88), second = ask(path, 99);
  run_until_waiting(1);
  EXPECT_EQ(open(path).error().code, Code::exhausted) << "but not who holds what is in the way";
  owner_.hang_up_all();
  EXPECT_EQ(replica_of(first), replica_of(second));
}

TEST_F(LineTest, an_asker_that_goes_takes_its_request_out_of_the_line) {
  load(write("a", 5 * kMiB)).value();
  const Granted gone = ask(write("b", 7 * kMiB), 88, 5);
  run_until_waiting(1);
  const Granted next = ask(write("c", kMiB), 99, 6);
  run_until_waiting(2);
  engine_.withdraw(5);
  EXPECT_TRUE(answer(next));
  EXPECT_FALSE(*gone);
  EXPECT_EQ(engine_.waiting_count(), 0u);
  EXPECT_EQ(engine_.replicas().size(), 2u);
}

TEST_F(LineTest, an_asker_that_goes_while_its_files_are_indexed_leaves_nothing) {
  const Granted gone = ask(write("a", kMiB), 88, 5);
  engine_.withdraw(5);
  owner_.run_until([&] { return engine_.replicas().empty(); });
  EXPECT_FALSE(*gone);
  EXPECT_EQ(engine_.memory().in_use_bytes(), 0u);
}

TEST_F(LineTest, the_index_of_what_waits_can_be_read) {
  load(write("a", 5 * kMiB)).value();
  const std::string path = write("b", 5 * kMiB);
  const Granted waiting = ask(path, 88);
  run_until_waiting(1);
  EXPECT_EQ(open(path, true).value().content->index.tensors.size(), 1u);
  engine_.cancel_all();
  EXPECT_EQ(answer(waiting).error().code, Code::cancelled);
}

TEST_F(LineTest, a_daemon_that_stops_lets_nobody_wait_for_others) {
  load(write("a", 5 * kMiB)).value();
  const Granted waiting = ask(write("b", 5 * kMiB), 88);
  run_until_waiting(1);
  bool drained = false;
  engine_.drain([&] { drained = true; });
  EXPECT_EQ(answer(waiting).error().code, Code::exhausted);
  EXPECT_TRUE(drained);
}

TEST_F(ImpatientTest, its_time_ends_though_nothing_else_happens) {
  const std::string path = write("a", 5 * kMiB);
  load(path).value();
  const Granted waiting = ask(write("b", 5 * kMiB), 88);
  run_until_waiting(1);
  EXPECT_EQ(answer(waiting).error().code, Code::exhausted);
  EXPECT_NE((*waiting)->error().message.find("replica 1 " + path + " (5.12 MiB, leased by test pid 77)"),
            std::string::npos)
      << (*waiting)->error().message;
  EXPECT_FALSE(engine_.replicas().contains(2));
}

TEST_F(ImpatientTest, who_comes_later_to_the_same_files_waits_its_own_time) {
  load(write("a", 5 * kMiB)).value();
  const std::string path = write("b", 5 * kMiB);
  const Granted first = ask(path, 88);
  run_until_waiting(1);
  OpenOrder patient = order(path);
  patient.holder.process_id = 99;
  patient.memory_wait_ms = 600'000;
  const Granted second = ask(std::move(patient));
  EXPECT_FALSE(answer(first));
  EXPECT_FALSE(*second);
  owner_.hang_up_all();
  EXPECT_TRUE(answer(second));
}

TEST_F(LineTest, a_lower_limit_evicts_what_nobody_holds_now_and_later) {
  load(write("a", 2 * kMiB)).value();
  owner_.hang_up_all();
  load(write("b", 4 * kMiB)).value();
  engine_.set_host_memory(3 * kMiB);
  EXPECT_EQ(engine_.replicas().size(), 1u);
  EXPECT_GT(engine_.memory().in_use_bytes(), 4 * kMiB);
  EXPECT_EQ(engine_.memory().kept_bytes(), 0u);
  owner_.hang_up_all();
  owner_.run_until([&] { return engine_.replicas().empty(); });
  run_until_idle();
  EXPECT_EQ(engine_.memory().kept_bytes(), 0u);
  EXPECT_EQ(open(write("c", 4 * kMiB)).value().fill_map_fd, -1) << "it is over the limit";
  engine_.set_host_memory(8 * kMiB);
  EXPECT_NE(load(write("d", 4 * kMiB)).value().fill_map_fd, -1);
}

TEST_F(LineTest, what_waits_and_no_longer_fits_gets_the_index_alone) {
  load(write("a", 5 * kMiB)).value();
  const Granted waiting = ask(write("b", 5 * kMiB), 88);
  run_until_waiting(1);
  engine_.set_host_memory(5 * kMiB);
  EXPECT_EQ(answer(waiting).value().segment_fds.size(), 0u);
}

TEST_F(EngineTest, descriptors_are_room_too) {
  std::vector<std::string> paths;
  for (unsigned at = 0; at < 12; ++at) paths.push_back(write("d" + std::to_string(at), 1000, at));
  for (const std::string& path : paths) {
    ASSERT_TRUE(load(path));
    owner_.hang_up_all();
  }
  EXPECT_GE(engine_.replicas().size(), 8u) << "three each, of 32, and a file";
  EXPECT_LE(engine_.replicas().size(), 10u);
  std::optional<base::Error> refused;
  for (size_t at = 0; at < paths.size() && !refused; ++at) {
    if (const auto granted = load(paths[at]); !granted) refused = granted.error();
  }
  ASSERT_TRUE(refused);
  EXPECT_EQ(refused->code, Code::exhausted);
  EXPECT_NE(refused->message.find("ulimit -n"), std::string::npos) << refused->message;
}

TEST_F(LineTest, an_open_waits_for_descriptors_as_for_memory) {
  std::vector<uint64_t> held;
  std::string last;
  Granted waiting;
  for (unsigned at = 0; engine_.waiting_count() == 0; ++at) {
    waiting = ask(write("d" + std::to_string(at), 1000, at), 88 + static_cast<pid_t>(at));
    owner_.run_until([&] { return waiting->has_value() || engine_.waiting_count() == 1; });
    run_until_idle();
  }
  let_go(1);
  EXPECT_TRUE(answer(waiting));
  EXPECT_FALSE(engine_.replicas().contains(1));
}

// ---- streams: parts of an artifact, batch by batch ------------------------------------------------------------------

TEST_F(LineTest, a_batch_waits_for_the_batches_of_others_and_of_other_threads) {
  const std::string path = write("a", 3 * kMiB, 1, 4);
  const Granted first = ask_batch(path, "w0", Stay::batch, 88),
                second = ask_batch(path, "w1", Stay::batch, 99);
  answer(first).value();
  answer(second).value();
  for (const pid_t process : {77, 88}) {
    const Granted waiting = ask_batch(path, "w2", Stay::batch, process);
    run_until_waiting(1);
    run_until_idle();
    EXPECT_FALSE(*waiting);
    let_go(replica_of(process == 77 ? first : second));
    EXPECT_TRUE(answer(waiting)) << process;
    let_go(replica_of(waiting));
    if (process == 77) answer(ask_batch(path, "w0", Stay::batch, 88)).value();
  }
  owner_.hang_up_all();
}

TEST_F(LineTest, a_batch_ahead_of_another_never_waits_so_two_streams_do_not_wait_for_each_other) {
  const std::string path = write("a", 3 * kMiB, 1, 4);
  const Granted mine = ask_batch(path, "w0", Stay::batch, 88),
                others = ask_batch(path, "w1", Stay::batch, 99);
  answer(mine).value();
  answer(others).value();
  EXPECT_EQ(answer(ask_batch(path, "w2", Stay::batch_ahead, 88)).error().code, Code::exhausted);
  EXPECT_EQ(answer(ask_batch(path, "w3", Stay::batch_ahead, 99)).error().code, Code::exhausted);
  let_go(replica_of(mine));
  const Granted next = ask_batch(path, "w2", Stay::batch, 88);
  EXPECT_TRUE(answer(next));
  EXPECT_EQ(answer(ask_batch(path, "w3", Stay::batch_ahead, 99)).error().code, Code::exhausted);
  let_go(replica_of(others));
  EXPECT_TRUE(answer(ask_batch(path, "w3", Stay::batch, 99)));
}

TEST_F(LineTest, a_batch_ahead_is_refused_where_others_wait_for_the_same_batch_and_it_does_not) {
  const std::string path = write("a", 3 * kMiB, 1, 3);
  const Granted mine = ask_batch(path, "w0", Stay::batch, 88),
                others = ask_batch(path, "w1", Stay::batch, 99);
  answer(mine).value();
  answer(others).value();
  const Granted waiting = ask_batch(path, "w2", Stay::batch, 77);
  run_until_waiting(1);
  EXPECT_FALSE(answer(ask_batch(path, "w2", Stay::batch_ahead, 88)));
  EXPECT_FALSE(*waiting);
  let_go(replica_of(mine));
  EXPECT_TRUE(answer(waiting));
}

TEST_F(LineTest, an_artifact_waits_for_batches_and_a_batch_for_what_stood_in_line_before) {
  const std::string path = write("a", 3 * kMiB, 1, 3);
  const Granted first = ask_batch(path, "w0", Stay::batch, 88);
  answer(first).value();
  const Granted artifact = ask(write("b", 7 * kMiB), 99);
  run_until_waiting(1);
  let_go(replica_of(first));
  const Granted second = ask_batch(path, "w1", Stay::batch, 88);
  EXPECT_TRUE(answer(artifact)) << "streams do not starve it";
  run_until_waiting(1);
  EXPECT_FALSE(*second);
  owner_.hang_up_all();
  EXPECT_TRUE(answer(second));
}

TEST_F(ImpatientTest, a_stream_gives_up_when_nothing_moves) {
  load(write("a", 7 * kMiB)).value();
  const std::string path = write("b", 3 * kMiB, 1, 2);
  EXPECT_EQ(answer(ask_batch(path, "w0", Stay::batch, 88)).error().code, Code::exhausted);
}

TEST_F(LineTest, batches_that_nobody_holds_stay_as_long_as_somebody_streams) {
  const std::string path = write("a", kMiB, 1, 3);
  const uint64_t first = replica_of(ask_batch(path, "w0", Stay::batch, 88));
  const uint64_t second = replica_of(ask_batch(path, "w1", Stay::batch, 99));
  run_until_idle();
  let_go(first);
  EXPECT_TRUE(engine_.replicas().contains(first)) << "who streams the same and lags behind finds it";
  EXPECT_EQ(replica_of(ask_batch(path, "w0", Stay::batch, 99)), first);
  owner_.hang_up_all();
  EXPECT_FALSE(engine_.replicas().contains(first));
  EXPECT_FALSE(engine_.replicas().contains(second));
}

TEST_F(LineTest, a_part_is_served_by_a_replica_that_holds_more) {
  const std::string path = write("a", kMiB, 1, 3);
  const uint64_t whole = load(path).value().replica;
  EXPECT_EQ(replica_of(ask_batch(path, "w1", Stay::batch, 88)), whole);
  OpenOrder two = order(path);
  two.only = {"w0", "w2"};
  EXPECT_EQ(replica_of(ask(std::move(two))), whole);
  EXPECT_EQ(engine_.last_load_report()->load, 1u);
}

TEST_F(LineTest, a_part_that_waits_is_served_by_a_replica_that_comes_to_hold_more) {
  const std::string path = write("a", 2 * kMiB, 1, 2);
  const uint64_t held = load(write("b", 7 * kMiB)).value().replica;
  const Granted whole = ask(path, 88);
  run_until_waiting(1);
  const Granted part = ask_batch(path, "w1", Stay::batch, 99);
  run_until_waiting(2);
  let_go(held);
  EXPECT_EQ(replica_of(part), replica_of(whole));
}

// Clients that open, stream, let go, and vanish at random: memory is never exceeded, and all are answered in the end.
TEST_F(LineTest, whatever_clients_do_the_limit_holds_and_everybody_is_answered) {
  engine_.set_host_memory(2 * kMiB);
  const auto seed = static_cast<uint32_t>(GTEST_FLAG_GET(random_seed));
  SCOPED_TRACE("--gtest_random_seed=" + std::to_string(seed));
  std::mt19937 random(seed);
  const auto below = [&](size_t most) { return random() % most; };
  std::vector<std::string> paths;
  for (unsigned at = 0; at < 5; ++at)
    paths.push_back(write("a" + std::to_string(at), (at + 1) * 380'000, at));
  const std::string streamed = write("s", 350'000, 9, 6);
  std::vector<std::pair<uint64_t, Granted>> asked;
  const auto held = [&] {
    std::vector<int> fds;
    for (const auto& [number, replica] : engine_.replicas()) {
      for (const auto& [lease, one] : replica->leases) fds.push_back(one.read_end.get());
    }
    return fds;
  };
  const auto expect_limit = [&] {
    EXPECT_LE(engine_.memory().in_use_bytes() + engine_.memory().kept_bytes(), 2 * kMiB);
  };
  for (int step = 0; step < 400; ++step) {
    const uint64_t client = 1 + below(6);
    OpenOrder one = order(below(2) == 0 ? paths[below(paths.size())] : streamed);
    if (one.path == streamed) {
      one.only = {"w" + std::to_string(below(6))};
      one.stay = below(3) == 0 ? Stay::batch_ahead : Stay::batch;
    }
    one.holder = {static_cast<pid_t>(100 + client), 0, "test", client};
    asked.emplace_back(client, ask(std::move(one)));
    if (const auto fds = held(); !fds.empty() && below(3) > 0) owner_.hang_up(fds[below(fds.size())]);
    if (below(20) == 0) {
      engine_.withdraw(client);
      std::erase_if(asked, [&](const auto& request) { return request.first == client && !*request.second; });
    }
    owner_.run_for(below(3));
    expect_limit();
  }
  owner_.run_until([&] {
    owner_.hang_up_all();
    expect_limit();
    return std::all_of(asked.begin(), asked.end(), [](const auto& one) { return one.second->has_value(); });
  });
  EXPECT_EQ(engine_.waiting_count(), 0u);
}

}  // namespace tensord::engine
