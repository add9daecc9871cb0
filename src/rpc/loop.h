// The owner thread's event loop: epoll, timers, and work posted from other threads.
#pragma once

#include <atomic>
#include <compare>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/fd.h"
#include "base/mutex.h"
#include "base/result.h"

namespace tensord::rpc {

using base::Result;
using base::Status;

// Everything but post() and stop() belongs to the thread that calls run() (or, before run(), to its maker).
class Loop {
 public:
  using Work = std::function<void()>;
  using Ready = std::function<void(uint32_t)>;

  static Result<std::unique_ptr<Loop>> open();

  // Calls `ready(epoll events)` while `fd` has any of `events` (EPOLLIN, EPOLLOUT; EPOLLHUP and EPOLLERR
  // always). `fd` stays the caller's and must be removed before it is closed. A callback may add and remove
  // any descriptor, its own included; after unwatch() no event that was on its way arrives any more.
  Status watch(int fd, uint32_t events, Ready ready);
  void change(int fd, uint32_t events);
  void unwatch(int fd);  // without effect when `fd` is not watched

  // Never reused; a default one is no timer.
  struct TimerId {
    int64_t deadline_ns = 0;
    uint64_t number = 0;
    auto operator<=>(const TimerId&) const = default;
  };
  TimerId call_after(int64_t delay_ms, Work work);
  void cancel(TimerId timer);  // without effect when it has fired

  // Thread safe: runs `work` on the loop's thread, in the order posted. Work posted after run() has returned
  // is run by drain() or dropped with the loop.
  void post(Work work);

  void run();    // until stop(); a stop() before run() counts
  void stop();   // thread safe
  void drain();  // runs what is posted, and what that posts, without waiting

 private:
  // Shared so that a callback that unwatches itself stays alive while it runs.
  struct Watch {
    uint32_t number = 0;  // tells the events of a descriptor from those of the one that had its number before
    Ready ready;
  };

  Loop() = default;
  void deliver(uint64_t tag, uint32_t events);
  bool run_posted();  // false when there was nothing
  void fire_timers();
  int wait_ms() const;  // until the next timer, -1 when there is none

  base::Fd epoll_;
  base::Fd wake_;
  std::atomic<bool> stopped_{false};
  uint64_t next_timer_ = 1;
  std::map<TimerId, Work> timers_;
  uint32_t next_watch_ = 1;
  std::unordered_map<int, std::shared_ptr<Watch>> watched_;
  base::Mutex mutex_;
  std::vector<Work> posted_ GUARDED_BY(mutex_);
};

}  // namespace tensord::rpc
