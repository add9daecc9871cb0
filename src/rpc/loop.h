// The owner thread's event loop: epoll, timers, and work posted from other threads.
#pragma once

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

  static Result<std::unique_ptr<Loop>> open();

  // Calls `ready(epoll events)` while `fd` has any of `events` (EPOLLIN, EPOLLOUT; EPOLLHUP and EPOLLERR always).
  // `fd` stays the caller's and must be removed before it is closed. A callback may add and remove any descriptor,
  // its own included.
  Status watch(int fd, uint32_t events, std::function<void(uint32_t)> ready);
  void change(int fd, uint32_t events);
  void unwatch(int fd);

  using TimerId = uint64_t;
  TimerId call_after(int64_t delay_ms, Work work);
  void cancel(TimerId timer);

  // Thread safe: runs `work` on the loop's thread, in the order posted. Work posted after run() has returned is run
  // by drain() or dropped with the loop.
  void post(Work work);

  void run();    // until stop()
  void stop();   // thread safe, also from a signal's descriptor callback
  void drain();  // runs what is posted, without waiting

 private:
  Loop() = default;
  int64_t fire_timers();  // milliseconds until the next one, -1 when there is none

  base::Fd epoll_;
  base::Fd wake_;
  bool stopped_ = false;
  uint64_t next_timer_ = 1;
  std::map<std::pair<int64_t, TimerId>, Work> timers_;  // by monotonic deadline in ns
  // Entries are shared so that a callback that unwatches itself stays alive while it runs.
  std::unordered_map<int, std::shared_ptr<std::function<void(uint32_t)>>> watched_;
  base::Mutex mutex_;
  std::vector<Work> posted_ GUARDED_BY(mutex_);
};

}  // namespace tensord::rpc
