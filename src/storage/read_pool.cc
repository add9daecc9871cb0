#include "storage/read_pool.h"

#include <pthread.h>

#include <condition_variable>
#include <deque>
#include <system_error>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/mutex.h"

namespace tensord::storage {

using base::MutexLock;

namespace {

class FifoReadPool final : public ReadPool {
 public:
  ~FifoReadPool() override {
    {
      MutexLock lock(mutex_);
      CHECK(items_.empty());
      stopping_ = true;
      wake_.notify_all();
    }
    for (std::thread& thread : threads_) thread.join();
  }

  Status start(int thread_count) {
    for (int i = 0; i < thread_count; ++i) {
      try {
        threads_.emplace_back([this] { run(); });
      } catch (const std::system_error& error) {
        return fail(base::Code::exhausted, "start read thread ", i + 1, " of ", thread_count, ": ",
                    error.what(), "; configure fewer or raise the limit on processes");
      }
    }
    return {};
  }

  int thread_count() const override { return static_cast<int>(threads_.size()); }

  void post(const void* owner, Work work) override {
    MutexLock lock(mutex_);
    CHECK(!stopping_);
    items_.push_back({owner, std::move(work)});
    wake_.notify_one();
  }

  std::vector<Work> withdraw(const void* owner) override {
    std::vector<Work> withdrawn;
    MutexLock lock(mutex_);
    std::erase_if(items_, [&](Item& item) {
      if (item.owner != owner) return false;
      withdrawn.push_back(std::move(item.work));
      return true;
    });
    return withdrawn;
  }

 private:
  struct Item {
    const void* owner;
    Work work;
  };

  void run() {
    pthread_setname_np(pthread_self(), "tensord-read");
    while (Work work = next()) work();
  }

  // Empty when the thread is to end.
  Work next() {
    MutexLock lock(mutex_);
    while (items_.empty() && !stopping_) lock.wait(wake_);
    if (items_.empty()) return {};
    Work work = std::move(items_.front().work);
    items_.pop_front();
    return work;
  }

  std::vector<std::thread> threads_;  // constant after start()
  base::Mutex mutex_;
  std::condition_variable wake_;
  std::deque<Item> items_ GUARDED_BY(mutex_);
  bool stopping_ GUARDED_BY(mutex_) = false;
};

}  // namespace

Result<std::unique_ptr<ReadPool>> start_read_pool(int thread_count) {
  CHECK(thread_count > 0);
  auto pool = std::make_unique<FifoReadPool>();
  TRY(pool->start(thread_count));
  return pool;
}

}  // namespace tensord::storage
