#include "engine/engine_testing.h"

namespace tensord::engine {

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
  EXPECT_NE(replica.waits_for.find("5.12 MiB; held: replica 1 " + path), std::string::npos) << replica.waits_for;
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
  const LoadReport before = engine_.explain(2).value();
  EXPECT_EQ(before.state, ReplicaState::waiting);
  EXPECT_GE(before.memory_ns, 2'000'000);
  let_go(held);
  answer(waiting).value();
  run_until_idle();
  const LoadReport after = engine_.explain(2).value();
  EXPECT_EQ(after.state, ReplicaState::ready);
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
  const Granted first = ask_batch(path, "w0", Stay::batch, 88), second = ask_batch(path, "w1", Stay::batch, 99);
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
  const Granted mine = ask_batch(path, "w0", Stay::batch, 88), others = ask_batch(path, "w1", Stay::batch, 99);
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
  const Granted mine = ask_batch(path, "w0", Stay::batch, 88), others = ask_batch(path, "w1", Stay::batch, 99);
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
  EXPECT_EQ(engine_.explain(engine_.last_opened()).value().load, 1u);
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
  for (unsigned at = 0; at < 5; ++at) paths.push_back(write("a" + std::to_string(at), (at + 1) * 380'000, at));
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
