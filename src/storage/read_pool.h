// Threads that run blocking reads, oldest first.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "base/result.h"

namespace tensord::storage {

using base::Result;

// Shared by any number of sources. Thread safe.
class ReadPool {
 public:
  using Work = std::function<void()>;

  ~ReadPool();  // every owner must be gone
  int thread_count() const { return static_cast<int>(threads_.size()); }
  // Runs `work` on one of the threads. Never blocks: those who ask for reads bound what they have in flight.
  void post(const void* owner, Work work);
  // Takes back what `owner` posted and no thread has begun, oldest first.
  std::vector<Work> withdraw(const void* owner);

 private:
  friend Result<std::unique_ptr<ReadPool>> start_read_pool(int thread_count);
  struct Item {
    const void* owner;
    Work work;
  };

  Work next();  // empty when the thread is to end

  std::vector<std::thread> threads_;  // constant after start_read_pool()
  base::Mutex mutex_;
  std::condition_variable wake_;
  std::deque<Item> items_ GUARDED_BY(mutex_);
  bool stopping_ GUARDED_BY(mutex_) = false;
};

// Starts the threads, named "tensord-read". Code::exhausted when the system refuses them.
Result<std::unique_ptr<ReadPool>> start_read_pool(int thread_count);

}  // namespace tensord::storage
