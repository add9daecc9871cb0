#include "rpc/loop.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

#include "base/check.h"
#include "base/clock.h"

namespace tensord::rpc {

namespace {

constexpr size_t kEventsPerTurn = 64;
using base::kNsPerMs;

uint64_t tag_of(int fd, uint32_t number) { return uint64_t{number} << 32 | static_cast<uint32_t>(fd); }

epoll_event event_of(uint32_t events, uint64_t tag) {
  epoll_event event{};
  event.events = events;
  event.data.u64 = tag;
  return event;
}

}  // namespace

Result<std::unique_ptr<Loop>> Loop::open() {
  std::unique_ptr<Loop> loop(new Loop);
  loop->epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  loop->wake_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!loop->epoll_.valid() || !loop->wake_.valid()) return base::fail_errno(errno, "open an event loop");
  TRY(loop->watch(loop->wake_.get(), EPOLLIN, [raw = loop.get()](uint32_t) {
    uint64_t count;
    CHECK(::read(raw->wake_.get(), &count, sizeof count) == sizeof count || errno == EAGAIN);
    raw->run_posted();
  }));
  return loop;
}

Status Loop::watch(int fd, uint32_t events, Ready ready) {
  auto entry = std::make_shared<Watch>(Watch{next_watch_++, std::move(ready)});
  epoll_event event = event_of(events, tag_of(fd, entry->number));
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
    return base::fail_errno(errno, "watch a descriptor");
  }
  watched_[fd] = std::move(entry);
  return {};
}

void Loop::change(int fd, uint32_t events) {
  const auto found = watched_.find(fd);
  CHECK(found != watched_.end());
  epoll_event event = event_of(events, tag_of(fd, found->second->number));
  CHECK(::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event) == 0);
}

void Loop::unwatch(int fd) {
  if (watched_.erase(fd) > 0) CHECK(::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr) == 0);
}

void Loop::deliver(uint64_t tag, uint32_t events) {
  const auto found = watched_.find(static_cast<int>(static_cast<uint32_t>(tag)));
  if (found == watched_.end() || found->second->number != tag >> 32) return;
  const std::shared_ptr<Watch> entry = found->second;
  entry->ready(events);
}

Loop::TimerId Loop::call_after(int64_t delay_ms, Work work) {
  const TimerId timer{base::monotonic_ns() + delay_ms * kNsPerMs, next_timer_++};
  timers_.emplace(timer, std::move(work));
  return timer;
}

void Loop::cancel(TimerId timer) { timers_.erase(timer); }

int Loop::wait_ms() const {
  if (timers_.empty()) return -1;
  const int64_t left_ns = std::max<int64_t>(timers_.begin()->first.deadline_ns - base::monotonic_ns(), 0);
  return static_cast<int>(std::min<int64_t>((left_ns + kNsPerMs - 1) / kNsPerMs, 1 << 30));
}

void Loop::fire_timers() {
  if (timers_.empty()) return;
  const int64_t now_ns = base::monotonic_ns();
  while (!timers_.empty() && timers_.begin()->first.deadline_ns <= now_ns && !stopped_) {
    const auto due = timers_.extract(timers_.begin());
    due.mapped()();
  }
}

void Loop::post(Work work) {
  {
    base::MutexLock lock(mutex_);
    posted_.push_back(std::move(work));
    if (posted_.size() > 1) return;  // the loop has been woken for the first
  }
  const uint64_t one = 1;
  CHECK(::write(wake_.get(), &one, sizeof one) == sizeof one);
}

bool Loop::run_posted() {
  std::vector<Work> posted;
  {
    base::MutexLock lock(mutex_);
    posted.swap(posted_);
  }
  for (Work& work : posted) std::exchange(work, nullptr)();
  return !posted.empty();
}

void Loop::drain() {
  while (run_posted()) {
  }
}

void Loop::stop() {
  stopped_ = true;
  const uint64_t one = 1;
  CHECK(::write(wake_.get(), &one, sizeof one) == sizeof one);
}

void Loop::run() {
  std::array<epoll_event, kEventsPerTurn> ready;
  while (!stopped_.exchange(false)) {
    const int count = ::epoll_wait(epoll_.get(), ready.data(), static_cast<int>(ready.size()), wait_ms());
    CHECK(count >= 0 || errno == EINTR);
    // What stop() leaves undelivered is still there at the next run().
    for (int at = 0; at < count && !stopped_; ++at) deliver(ready[at].data.u64, ready[at].events);
    fire_timers();
  }
}

}  // namespace tensord::rpc
