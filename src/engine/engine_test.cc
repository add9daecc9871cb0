#include "engine/engine.h"

#include "engine/engine_testing.h"

namespace tensord::engine {

TEST_F(EngineTest, a_load_ends_ready_with_an_artifact_id_and_a_report) {
  const Grant grant = load(write("a", 100'000)).value();
  const Replica& replica = engine_.replica(grant.replica);
  EXPECT_EQ(replica.state, ReplicaState::ready);
  EXPECT_TRUE(replica.artifact.has_value());
  const LoadReport report = engine_.explain(grant.replica).value();
  EXPECT_EQ(report.state, ReplicaState::ready);
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
  EXPECT_EQ(engine_.explain(replicas[0])->load, 1u);
  EXPECT_EQ(engine_.last_opened(), replicas[0]);
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
}

TEST_F(EngineTest, a_second_load_is_checked_against_the_first) {
  const std::string path = write("a", 100'000);
  const uint64_t first = load(path).value().replica;
  owner_.hang_up_all();
  ASSERT_TRUE(engine_.evict(first));
  EXPECT_TRUE(engine_.explain(load(path).value().replica)->checked_against_record);
}

// Writes into a file as a failing disk does: its mtime stays.
bool change_behind_mtime(const std::string& path, off_t at) {
  struct stat before;
  const base::Fd fd(::open(path.c_str(), O_WRONLY));
  if (::fstat(fd.get(), &before) != 0 || ::pwrite(fd.get(), "changed", 7, at) != 7) return false;
  const timespec times[2] = {before.st_atim, before.st_mtim};
  return ::futimens(fd.get(), times) == 0;
}

TEST_F(EngineTest, bytes_that_changed_behind_an_unchanged_mtime_fail_the_load) {
  const std::string path = write("a", 100'000);
  const uint64_t first = load(path).value().replica;
  owner_.hang_up_all();
  ASSERT_TRUE(engine_.evict(first));
  ASSERT_TRUE(change_behind_mtime(path, 50'000));
  const Grant grant = load(path).value();
  const Replica& replica = engine_.replica(grant.replica);
  EXPECT_EQ(replica.state, ReplicaState::failed);
  EXPECT_EQ(replica.error->code, Code::corrupt);
  EXPECT_NE(replica.error->message.find(path + ": tensor 'w', leaf 0"), std::string::npos) << replica.error->message;
}

// Devices that have done everything as soon as they are asked.
class QuickDevices final : public Devices {
 public:
  explicit QuickDevices(TestOwner& owner) : owner_(owner) {}
  void make(const std::string&, uint64_t, std::function<void(Result<Allocations>)> done) override {
    owner_.post([done] { done(Allocations()); });
  }
  void fill(const Replica&, Replica&, std::function<void(Status)> done) override {
    owner_.post([done] { done({}); });
  }
  bool reaches(const std::string&, const std::string&) override { return false; }

 private:
  TestOwner& owner_;
};

TEST_F(EngineTest, a_load_that_fails_at_its_end_fails_the_copy_on_a_device) {
  const std::string path = write("a", 6 << 20);
  const uint64_t first = load(path).value().replica;
  owner_.hang_up_all();
  ASSERT_TRUE(engine_.evict(first));
  ASSERT_TRUE(change_behind_mtime(path, 6'000'000));
  QuickDevices devices(owner_);
  engine_.use_devices(devices);
  OpenOrder asked = order(path);
  asked.device = "GPU-0";
  const uint64_t copy = replica_of(ask(std::move(asked)));
  owner_.run_until([&] {
    // The host's replica goes as soon as nobody but the copy holds it.
    for (const auto& [number, replica] : engine_.replicas()) {
      if (number != copy && !replica->leases.empty()) let_go(number);
    }
    return engine_.running_count() == 0;
  });
  EXPECT_EQ(engine_.replica(copy).state, ReplicaState::failed);
  EXPECT_EQ(engine_.replica(copy).error->code, Code::corrupt);
  EXPECT_EQ(engine_.replicas().size(), 1u);
  owner_.hang_up_all();
  EXPECT_TRUE(engine_.replicas().empty());
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

TEST_F(EngineTest, a_replica_knows_every_name_it_was_opened_by) {
  const std::string path = write("a", 1000);
  const std::string link = folder_ + "/link";
  ASSERT_EQ(::symlink(path.c_str(), link.c_str()), 0);
  const uint64_t replica = load(path).value().replica;
  EXPECT_EQ(load(link).value().replica, replica);
  EXPECT_EQ(engine_.find(replica).value()->paths, (std::vector<std::string>{path, link}));
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
  EXPECT_EQ(engine_.find(replica).error().code, Code::not_found);
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
    std::optional<Result<std::vector<VerifyFault>>> faults;
    engine_.verify(grant.replica, [&](auto done) { faults = std::move(done); });
    owner_.run_until([&] { return faults.has_value(); });
    return std::move(*faults).value();
  };
  EXPECT_TRUE(verify().empty());
  const Replica& replica = engine_.replica(grant.replica);
  const tensor::Tensor& tensor = replica.content->index.tensors[0];
  replica.memory.data()[tensor.offset + (2 << 20) + 17] ^= std::byte{4};
  const std::vector<VerifyFault> damaged = verify();
  ASSERT_EQ(damaged.size(), 1u);
  EXPECT_EQ(damaged[0].file, path);
  EXPECT_EQ(damaged[0].tensor, "w");
  EXPECT_EQ(damaged[0].leaf, 2u);
  EXPECT_EQ(damaged[0].offset, tensor.offset + (2 << 20));
}

TEST_F(EngineTest, a_catalog_that_fails_does_not_fail_the_load) {
  catalog::Stranger(catalog_folder_.file("catalog")).execute("DROP TABLE files");
  ASSERT_EQ(catalog_->remember({}).error().code, Code::corrupt);
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

}  // namespace tensord::engine
