#include "rpc/loop.h"

#include <gtest/gtest.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <string>
#include <thread>

namespace tensord::rpc {
namespace {

base::Pipe readable_pipe() {
  base::Pipe pipe = base::make_pipe().value();
  EXPECT_EQ(::write(pipe.write_end.get(), "x", 1), 1);
  return pipe;
}

TEST(Loop, work_posted_by_other_threads_runs_in_their_order) {
  const auto loop = Loop::open().value();
  std::vector<int> last(4, -1);
  int ran = 0;
  std::vector<std::thread> posters;
  for (int poster = 0; poster < 4; ++poster) {
    posters.emplace_back([&, poster] {
      for (int at = 0; at < 500; ++at) {
        loop->post([&, poster, at] {
          EXPECT_EQ(last[poster] + 1, at);
          last[poster] = at;
          if (++ran == 2000) loop->stop();
        });
      }
    });
  }
  loop->run();
  for (std::thread& poster : posters) poster.join();
  EXPECT_EQ(ran, 2000);
}

TEST(Loop, stop_before_run_counts_and_run_can_be_called_again) {
  const auto loop = Loop::open().value();
  loop->stop();
  loop->run();
  bool ran = false;
  loop->post([&] {
    ran = true;
    loop->stop();
  });
  loop->run();
  EXPECT_TRUE(ran);
}

TEST(Loop, drain_runs_what_posted_work_posts_and_returns) {
  const auto loop = Loop::open().value();
  std::string order;
  loop->post([&] {
    order += "a";
    loop->post([&] { order += "c"; });
  });
  loop->post([&] { order += "b"; });
  loop->drain();
  EXPECT_EQ(order, "abc");
}

TEST(Loop, work_that_never_ran_is_dropped_with_the_loop) {
  auto held = std::make_shared<int>(0);
  auto loop = Loop::open().value();
  loop->post([held] {});
  loop->call_after(1'000'000, [held] {});
  EXPECT_EQ(held.use_count(), 3);
  loop.reset();
  EXPECT_EQ(held.use_count(), 1);
}

TEST(Loop, timers_fire_by_deadline_and_not_when_cancelled) {
  const auto loop = Loop::open().value();
  std::string order;
  loop->call_after(2, [&] {
    order += "c";
    loop->stop();
  });
  loop->call_after(1, [&] { order += "b"; });
  const Loop::TimerId never = loop->call_after(1, [&] { order += "x"; });
  loop->call_after(0, [&] {
    order += "a";
    loop->cancel(never);
  });
  loop->cancel({});
  loop->run();
  loop->cancel(never);
  EXPECT_EQ(order, "abc");
}

TEST(Loop, a_callback_that_unwatches_itself_lives_to_its_end) {
  const auto loop = Loop::open().value();
  const base::Pipe pipe = readable_pipe();
  auto held = std::make_shared<std::string>("alive");
  const std::weak_ptr<std::string> seen = held;
  int calls = 0;
  ASSERT_TRUE(loop->watch(pipe.read_end.get(), EPOLLIN, [&, held = std::move(held)](uint32_t) {
    loop->unwatch(pipe.read_end.get());
    EXPECT_EQ(*held, "alive");
    ++calls;
    loop->post([&] { loop->stop(); });
  }));
  loop->run();
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(seen.expired());
}

TEST(Loop, an_event_on_its_way_to_an_unwatched_descriptor_is_dropped) {
  const auto loop = Loop::open().value();
  base::Pipe first = readable_pipe();
  base::Pipe second = readable_pipe();
  int calls = 0;
  // Both are ready in one turn; whoever is called first removes the other.
  ASSERT_TRUE(loop->watch(first.read_end.get(), EPOLLIN, [&](uint32_t) {
    ++calls;
    loop->unwatch(second.read_end.get());
    loop->stop();
  }));
  ASSERT_TRUE(loop->watch(second.read_end.get(), EPOLLIN, [&](uint32_t) {
    ++calls;
    loop->unwatch(first.read_end.get());
    loop->stop();
  }));
  loop->run();
  EXPECT_EQ(calls, 1);
}

TEST(Loop, a_descriptor_with_a_reused_number_gets_no_event_of_the_former) {
  const auto loop = Loop::open().value();
  base::Pipe first = readable_pipe();
  base::Pipe second = readable_pipe();
  const base::Pipe quiet = base::make_pipe().value();
  bool stale = false;
  const auto replace = [&](int other) {
    loop->unwatch(other);
    ASSERT_EQ(::dup2(quiet.read_end.get(), other), other);  // closes and reuses the number at once
    ASSERT_TRUE(loop->watch(other, EPOLLIN, [&](uint32_t) { stale = true; }));
    loop->call_after(0, [&] { loop->stop(); });
  };
  ASSERT_TRUE(loop->watch(first.read_end.get(), EPOLLIN, [&](uint32_t) {
    loop->unwatch(first.read_end.get());
    replace(second.read_end.get());
  }));
  ASSERT_TRUE(loop->watch(second.read_end.get(), EPOLLIN, [&](uint32_t) {
    loop->unwatch(second.read_end.get());
    replace(first.read_end.get());
  }));
  loop->run();
  EXPECT_FALSE(stale);
}

TEST(Loop, a_hangup_arrives_without_being_asked_for) {
  const auto loop = Loop::open().value();
  base::Pipe pipe = base::make_pipe().value();
  uint32_t seen = 0;
  ASSERT_TRUE(loop->watch(pipe.read_end.get(), 0, [&](uint32_t events) {
    seen = events;
    loop->stop();
  }));
  pipe.write_end.reset();
  loop->run();
  EXPECT_EQ(seen, static_cast<uint32_t>(EPOLLHUP));
}

TEST(Loop, change_chooses_the_events) {
  const auto loop = Loop::open().value();
  const base::Pipe pipe = base::make_pipe().value();
  int calls = 0;
  ASSERT_TRUE(loop->watch(pipe.write_end.get(), 0, [&](uint32_t events) {
    EXPECT_EQ(events, static_cast<uint32_t>(EPOLLOUT));
    ++calls;
    loop->change(pipe.write_end.get(), 0);
    loop->call_after(0, [&] { loop->stop(); });
  }));
  loop->change(pipe.write_end.get(), EPOLLOUT);
  loop->run();
  EXPECT_EQ(calls, 1);
}

TEST(Loop, watching_what_cannot_be_watched_is_an_error) {
  const auto loop = Loop::open().value();
  EXPECT_FALSE(loop->watch(-1, EPOLLIN, [](uint32_t) {}));
  loop->unwatch(-1);
}

}  // namespace
}  // namespace tensord::rpc
