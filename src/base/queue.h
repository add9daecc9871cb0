// A bounded queue between threads that can be closed.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <optional>
#include <utility>

#include "base/mutex.h"

namespace tensord::base {

// Thread safe. push() waits while `count_max` items lie in the queue; after close() push() refuses and pop() hands
// out what is left, then nullopt.
template <typename T>
class Queue {
 public:
  explicit Queue(size_t count_max) : count_max_(count_max) {}

  // False when the queue is closed: the item was not taken.
  bool push(T item) {
    MutexLock lock(mutex_);
    while (items_.size() >= count_max_ && !closed_) lock.wait(has_room_);
    if (closed_) return false;
    items_.push_back(std::move(item));
    has_item_.notify_one();
    return true;
  }

  std::optional<T> pop() {
    MutexLock lock(mutex_);
    while (items_.empty() && !closed_) lock.wait(has_item_);
    if (items_.empty()) return std::nullopt;
    T item = std::move(items_.front());
    items_.pop_front();
    has_room_.notify_one();
    return item;
  }

  void close() {
    MutexLock lock(mutex_);
    closed_ = true;
    has_item_.notify_all();
    has_room_.notify_all();
  }

 private:
  const size_t count_max_;
  Mutex mutex_;
  std::condition_variable has_item_;
  std::condition_variable has_room_;
  std::deque<T> items_ GUARDED_BY(mutex_);
  bool closed_ GUARDED_BY(mutex_) = false;
};

}  // namespace tensord::base
