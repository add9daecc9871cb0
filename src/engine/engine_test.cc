#include "engine/engine.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <condition_variable>
#include <fstream>
#include <random>

#include "catalog/memory_catalog.h"

namespace tensord::engine {

namespace {

using base::Code;

// The owner's thread of a test: the test itself, which runs posted work until something has come true.
class TestOwner {
 public:
  Owner owner() {
    return {.post =
                [this](std::function<void()> work) {
                  base::MutexLock lock(mutex_);
                  posted_.push_back(std::move(work));
                  changed_.notify_one();
                },
            .watch_hangup =
                [this](int fd, std::function<void()> gone) {
                  hangups_[fd] = std::move(gone);
                  return Status();
                },
            .unwatch = [this](int fd) { hangups_.erase(fd); },
            .call_after = [this](int64_t, std::function<void()> work) { timers_.push_back(std::move(work)); }};
  }

  void run_until(const std::function<bool()>& reached) {
    while (!reached()) run_one();
  }

  // Waits for work and runs it.
  void run_one() {
    std::function<void()> work;
    {
      base::MutexLock lock(mutex_);
      while (posted_.empty()) lock.wait(changed_);
      work = std::move(posted_.front());
      posted_.pop_front();
    }
    work();
  }

  // As if the time of every timer had come.
  void fire_timers() {
    for (const auto& work : std::exchange(timers_, {})) work();
  }
  size_t timer_count() const { return timers_.size(); }

  void hang_up_all() {
    while (!hangups_.empty()) std::function<void()>(hangups_.begin()->second)();
  }

 private:
  base::Mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> posted_ GUARDED_BY(mutex_);
  std::map<int, std::function<void()>> hangups_;
  std::vector<std::function<void()>> timers_;
};

class EngineTest : public testing::Test {
 protected:
  explicit EngineTest(uint64_t host_memory_bytes = 8 << 20, int64_t memory_wait_ms = 0)
      : catalog_thread_(storage::start_read_pool(1).value()),
        pool_(storage::start_read_pool(2).value()),
        engine_(
            {.host_memory_bytes = host_memory_bytes,
             .encode_index = [](const tensor::Index&) { return Result<IndexFile>(IndexFile{}); },
             .memory_wait_ms = memory_wait_ms,
             .descriptor_count_max = 24},
            *catalog_, *catalog_thread_, *pool_, owner_.owner()) {
    std::string name = "/tmp/tensord-engine-test-XXXXXX";
    folder_ = ::mkdtemp(name.data());
  }
  ~EngineTest() override {
    owner_.run_until([&] { return engine_.running_count() == 0; });
    std::system(("rm -rf " + folder_).c_str());
  }

  // A file with one U8 tensor "w" of `size_bytes` pseudo-random bytes.
  std::string write(const std::string& name, size_t size_bytes, unsigned seed = 1) {
    const std::string path = folder_ + "/" + name;
    const std::string header = R"({"w":{"dtype":"U8","shape":[)" + std::to_string(size_bytes) +
                               R"(],"data_offsets":[0,)" + std::to_string(size_bytes) + "]}}";
    std::mt19937 random(seed);
    std::string bytes(size_bytes, '\0');
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
  // Asks as another process, whose answer may take long.
  Granted ask(const std::string& path, pid_t process_id, uint64_t asker = 0) {
    auto granted = std::make_shared<std::optional<Result<Grant>>>();
    OpenOrder asked = order(path);
    asked.holder.process_id = process_id;
    asked.holder.asker = asker;
    engine_.open(std::move(asked), [granted](Result<Grant> grant) { *granted = std::move(grant); });
    return granted;
  }
  void run_until_waiting(size_t count) {
    owner_.run_until([&] { return engine_.waiting_count() == count; });
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

TEST_F(EngineTest, an_artifact_above_the_limit_is_refused_but_its_index_can_be_read) {
  const std::string path = write("a", 9 << 20);
  const Result<Grant> refused = open(path);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, Code::exhausted);
  EXPECT_NE(refused.error().message.find("raise host_memory"), std::string::npos);
  const Grant index = open(path, true).value();
  EXPECT_EQ(index.content->index.tensors.size(), 1u);
  EXPECT_EQ(index.fill_map_fd, -1);
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

// ---- waiting for memory ---------------------------------------------------------------------------------------------

namespace {
class WaitingTest : public EngineTest {
 protected:
  WaitingTest() : EngineTest(8 << 20, 60'000) {}
};
// Its time has come when a timer is fired.
class ImpatientTest : public EngineTest {
 protected:
  ImpatientTest() : EngineTest(8 << 20, 1) {}
};
}  // namespace

TEST_F(WaitingTest, an_open_waits_until_a_lease_ends) {
  const std::string path = write("a", 5 << 20);
  load(path).value();
  const Granted waiting = ask(write("b", 5 << 20), 88);
  run_until_waiting(1);
  const Replica& replica = engine_.replica(2);
  EXPECT_EQ(replica.state, ReplicaState::waiting);
  EXPECT_NE(replica.waits_for.find("5.12 MiB; held: replica 1 " + path), std::string::npos) << replica.waits_for;
  owner_.hang_up_all();
  owner_.run_until([&] { return waiting->has_value(); });
  EXPECT_TRUE(*waiting);
  EXPECT_FALSE(engine_.replicas().contains(1));
}

TEST_F(WaitingTest, what_waiting_cannot_help_is_refused_at_once) {
  load(write("a", 5 << 20)).value();
  EXPECT_EQ(open(write("b", 5 << 20)).error().code, Code::exhausted);  // by the process that holds it
  EXPECT_EQ(open(write("c", 9 << 20)).error().code, Code::exhausted);
  engine_.set_pinned(1, true);
  const Granted other = ask(write("d", 5 << 20), 88);
  owner_.run_until([&] { return other->has_value(); });
  EXPECT_EQ((*other)->error().code, Code::exhausted);
  EXPECT_EQ(engine_.running_count(), 0u);
}

TEST_F(WaitingTest, a_small_one_does_not_pass_a_large_one_but_what_is_resident_is_granted) {
  const std::string resident = write("a", 5 << 20);
  load(resident).value();
  const Granted large = ask(write("b", 7 << 20), 88);
  run_until_waiting(1);
  const Granted small = ask(write("c", 1 << 20), 101);
  run_until_waiting(2);
  EXPECT_TRUE(*ask(resident, 99));
  owner_.hang_up_all();
  owner_.run_until([&] { return large->has_value(); });
  EXPECT_TRUE(*large);
  EXPECT_FALSE(*small);
  owner_.run_until([&] { return engine_.running_count() == 1; });  // the large one is ready, the small one waits
  owner_.hang_up_all();
  owner_.run_until([&] { return small->has_value(); });
  EXPECT_TRUE(*small);
}

TEST_F(WaitingTest, an_asker_that_goes_takes_its_request_out_of_the_line) {
  load(write("a", 5 << 20)).value();
  const Granted gone = ask(write("b", 7 << 20), 88, 5);
  run_until_waiting(1);
  const Granted next = ask(write("c", 1 << 20), 99, 6);
  run_until_waiting(2);
  engine_.withdraw(5);
  owner_.run_until([&] { return next->has_value(); });
  EXPECT_TRUE(*next);
  EXPECT_FALSE(*gone);
  EXPECT_EQ(engine_.waiting_count(), 0u);
}

TEST_F(WaitingTest, the_index_of_what_waits_can_be_read) {
  load(write("a", 5 << 20)).value();
  const std::string path = write("b", 5 << 20);
  const Granted waiting = ask(path, 88);
  run_until_waiting(1);
  EXPECT_EQ(open(path, true).value().content->index.tensors.size(), 1u);
  engine_.cancel_all();
  EXPECT_EQ((*waiting)->error().code, Code::cancelled);
}

TEST_F(ImpatientTest, after_its_time_it_is_refused_with_the_holders) {
  const std::string path = write("a", 5 << 20);
  load(path).value();
  const Granted waiting = ask(write("b", 5 << 20), 88);
  owner_.run_until([&] { return waiting->has_value() || owner_.timer_count() > 0; });
  ::usleep(2000);  // the wait itself
  owner_.fire_timers();
  ASSERT_TRUE(waiting->has_value());
  EXPECT_EQ((*waiting)->error().code, Code::exhausted);
  EXPECT_NE((*waiting)->error().message.find("replica 1 " + path), std::string::npos);
}

TEST_F(WaitingTest, a_lower_limit_evicts_what_nobody_holds_now_and_later) {
  load(write("a", 2 << 20)).value();
  owner_.hang_up_all();
  load(write("b", 4 << 20)).value();
  engine_.set_host_memory(3 << 20);
  EXPECT_EQ(engine_.replicas().size(), 1u);
  EXPECT_GT(engine_.memory().in_use_bytes(), uint64_t{4 << 20});
  EXPECT_EQ(engine_.memory().kept_bytes(), 0u);
  owner_.hang_up_all();
  EXPECT_TRUE(engine_.replicas().empty());
  EXPECT_EQ(engine_.memory().kept_bytes(), 0u);
  engine_.set_host_memory(8 << 20);
  EXPECT_TRUE(load(write("c", 4 << 20)));
}

TEST_F(EngineTest, descriptors_are_room_too) {
  const std::string path = write("a", 1000);
  std::vector<std::string> paths;
  for (int at = 0; at < 12; ++at) paths.push_back(write("d" + std::to_string(at), 1000, at));
  for (const std::string& one : paths) {
    ASSERT_TRUE(load(one));
    owner_.hang_up_all();
  }
  EXPECT_LT(engine_.replicas().size(), 9u);  // three each, of 24
  std::optional<Result<Grant>> last;
  std::vector<Grant> held;
  for (const std::string& one : paths) {
    last = load(one);
    if (!*last) break;
  }
  ASSERT_FALSE(*last);
  EXPECT_EQ(last->error().code, Code::exhausted);
  EXPECT_NE(last->error().message.find("ulimit -n"), std::string::npos) << last->error().message;
}

}  // namespace tensord::engine
