// Threads that run blocking reads, oldest first.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "base/result.h"

namespace tensord::storage {

using base::Result;
using base::Status;

// Shared by any number of sources. Thread safe.
class ReadPool {
 public:
  using Work = std::function<void()>;

  virtual ~ReadPool() = default;  // every owner must be gone
  virtual int thread_count() const = 0;
  // Runs `work` on one of the threads. Never blocks: those who ask for reads bound what they have in flight.
  virtual void post(const void* owner, Work work) = 0;
  // Takes back what `owner` posted and no thread has begun, oldest first.
  virtual std::vector<Work> withdraw(const void* owner) = 0;
};

// Starts the threads, named "tensord-read". Code::exhausted when the system refuses them.
Result<std::unique_ptr<ReadPool>> start_read_pool(int thread_count);

}  // namespace tensord::storage
