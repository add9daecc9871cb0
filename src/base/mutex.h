// A mutex that clang's thread-safety analysis understands.
#pragma once

#include <condition_variable>
#include <mutex>

#if defined(__clang__)
#define TENSORD_ATTRIBUTE(x) __attribute__((x))
#else
#define TENSORD_ATTRIBUTE(x)
#endif
#define GUARDED_BY(mutex) TENSORD_ATTRIBUTE(guarded_by(mutex))
#define REQUIRES(mutex) TENSORD_ATTRIBUTE(requires_capability(mutex))
#define CAPABILITY(name) TENSORD_ATTRIBUTE(capability(name))
#define SCOPED_CAPABILITY TENSORD_ATTRIBUTE(scoped_lockable)
#define ACQUIRE(...) TENSORD_ATTRIBUTE(acquire_capability(__VA_ARGS__))
#define RELEASE(...) TENSORD_ATTRIBUTE(release_capability(__VA_ARGS__))

namespace tensord::base {

class CAPABILITY("mutex") Mutex {
 public:
  friend class MutexLock;
  std::mutex mutex_;
};

class SCOPED_CAPABILITY MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) ACQUIRE(mutex) : lock_(mutex.mutex_) {}
  ~MutexLock() RELEASE() {}
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

  // Waits for `condition.notify_*`; may wake without one.
  void wait(std::condition_variable& condition) { condition.wait(lock_); }
  // False when the time is over.
  template <typename Duration>
  bool wait_for(std::condition_variable& condition, Duration time) {
    return condition.wait_for(lock_, time) == std::cv_status::no_timeout;
  }

 private:
  std::unique_lock<std::mutex> lock_;
};

}  // namespace tensord::base
