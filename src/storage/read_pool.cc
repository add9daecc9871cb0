#include "storage/read_pool.h"

#include <pthread.h>

#include <system_error>
#include <utility>

#include "base/check.h"

namespace tensord::storage {

using base::MutexLock;

ReadPool::~ReadPool() {
  {
    MutexLock lock(mutex_);
    CHECK(items_.empty());
    stopping_ = true;
    wake_.notify_all();
  }
  for (std::thread& thread : threads_) thread.join();
}

void ReadPool::post(const void* owner, Work work) {
  MutexLock lock(mutex_);
  CHECK(!stopping_);
  items_.push_back({owner, std::move(work)});
  wake_.notify_one();
}

std::vector<ReadPool::Work> ReadPool::withdraw(const void* owner) {
  std::vector<Work> withdrawn;
  MutexLock lock(mutex_);
  std::erase_if(items_, [&](Item& item) {
    if (item.owner != owner) return false;
    withdrawn.push_back(std::move(item.work));
    return true;
  });
  return withdrawn;
}

ReadPool::Work ReadPool::next() {
  MutexLock lock(mutex_);
  while (items_.empty() && !stopping_) lock.wait(wake_);
  if (items_.empty()) return {};
  Work work = std::move(items_.front().work);
  items_.pop_front();
  return work;
}

Result<std::unique_ptr<ReadPool>> start_read_pool(int thread_count) {
  CHECK(thread_count > 0);
  auto pool = std::make_unique<ReadPool>();
  for (int i = 0; i < thread_count; ++i) {
    try {
      pool->threads_.emplace_back([raw = pool.get()] {
        pthread_setname_np(pthread_self(), "tensord-read");
        while (ReadPool::Work work = raw->next()) work();
      });
    } catch (const std::system_error& error) {
      return fail(base::Code::exhausted, "start read thread ", i + 1, " of ", thread_count, ": ", error.what(),
                  "; configure fewer or raise the limit on processes");
    }
  }
  return pool;
}

}  // namespace tensord::storage
