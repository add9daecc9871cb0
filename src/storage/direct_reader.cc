#include "storage/direct_reader.h"

#include <liburing.h>
#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <deque>
#include <system_error>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/mutex.h"
#include "storage/read_pool.h"

namespace tensord::storage {

using base::Code;
using base::MutexLock;

namespace {

struct DirectRead {
  int fd = -1;
  std::byte* target = nullptr;
  size_t size_bytes = 0;
  uint64_t offset = 0;
  DirectReader::Done done;
  int64_t result = 0;  // of one that the kernel did not take
};

// One ring. Any thread submits, under the mutex; one thread waits for what is complete.
class UringReader final : public DirectReader {
 public:
  ~UringReader() override {
    if (thread_.joinable()) {
      stop();
      thread_.join();
    }
    if (is_open_) io_uring_queue_exit(&ring_);
  }

  base::Status start() {
    const int error = -io_uring_queue_init(kDirectDepth, &ring_, 0);
    if (error != 0) return fail(Code::unsupported, base::errno_error("io_uring_setup", error).message);
    is_open_ = true;
    io_uring_probe* probe = io_uring_get_probe_ring(&ring_);
    const bool reads = probe != nullptr && io_uring_opcode_supported(probe, IORING_OP_READ);
    io_uring_free_probe(probe);
    if (!reads) return fail(Code::unsupported, "io_uring of this kernel knows no plain reads");
    try {
      thread_ = std::thread([this] { reap(); });
    } catch (const std::system_error& problem) {
      return fail(Code::unsupported, "start the io_uring thread: ", problem.what());
    }
    return {};
  }

  const char* name() const override { return "io_uring"; }

  void read(int fd, std::byte* target, size_t size_bytes, uint64_t offset, Done done) override {
    Reads refused;
    {
      MutexLock lock(mutex_);
      waiting_.push_back(std::make_unique<DirectRead>(fd, target, size_bytes, offset, std::move(done)));
      refused = submit();
    }
    for (auto& one : refused) one->done(one->result);
  }

 private:
  using Reads = std::deque<std::unique_ptr<DirectRead>>;

  // Hands the kernel what waits, as far as there is room. When it takes none any more, returns all that it has not taken.
  Reads submit() REQUIRES(mutex_) {
    while (!waiting_.empty() && in_kernel_ < kDirectDepth) {
      io_uring_sqe* entry = io_uring_get_sqe(&ring_);
      if (entry == nullptr) return refuse(EBUSY);
      DirectRead* read = waiting_.front().get();
      io_uring_prep_read(entry, read->fd, read->target, static_cast<unsigned>(read->size_bytes), read->offset);
      io_uring_sqe_set_data(entry, read);
      int taken = 0;
      do {
        taken = io_uring_submit(&ring_);
      } while (taken == -EINTR || taken == -EAGAIN);
      if (taken < 0) {
        io_uring_prep_nop(entry);  // in case a later submit takes it after all
        io_uring_sqe_set_data(entry, &nothing_);
        return refuse(-taken);
      }
      waiting_.front().release();  // the kernel has it now
      waiting_.pop_front();
      ++in_kernel_;
    }
    return {};
  }

  Reads refuse(int error) REQUIRES(mutex_) {
    for (auto& read : waiting_) read->result = -error;
    return std::exchange(waiting_, {});
  }

  void reap() {
    pthread_setname_np(pthread_self(), "tensord-uring");
    while (true) {
      io_uring_cqe* entry = nullptr;
      const int waited = io_uring_wait_cqe(&ring_, &entry);
      if (waited == -EINTR || waited == -EAGAIN) continue;
      CHECK(waited == 0);
      void* data = io_uring_cqe_get_data(entry);
      const int64_t result = entry->res;
      io_uring_cqe_seen(&ring_, entry);
      if (data == nullptr) return;
      if (data == &nothing_) continue;
      const std::unique_ptr<DirectRead> read(static_cast<DirectRead*>(data));
      Reads refused;
      {
        MutexLock lock(mutex_);
        --in_kernel_;
        refused = submit();
      }
      read->done(result);
      for (auto& one : refused) one->done(one->result);
    }
  }

  // Wakes the thread for the last time.
  void stop() {
    MutexLock lock(mutex_);
    CHECK(in_kernel_ == 0 && waiting_.empty());
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    CHECK(entry != nullptr);
    io_uring_prep_nop(entry);
    io_uring_sqe_set_data(entry, nullptr);
    CHECK(io_uring_submit(&ring_) >= 0);
  }

  io_uring ring_{};  // its submission side under mutex_, its completion side by thread_
  bool is_open_ = false;
  char nothing_ = 0;
  std::thread thread_;  // constant after start()
  base::Mutex mutex_;
  Reads waiting_ GUARDED_BY(mutex_);
  uint32_t in_kernel_ GUARDED_BY(mutex_) = 0;
};

class PreadReader final : public DirectReader {
 public:
  explicit PreadReader(std::unique_ptr<ReadPool> pool) : pool_(std::move(pool)) {}

  const char* name() const override { return "pread threads"; }

  void read(int fd, std::byte* target, size_t size_bytes, uint64_t offset, Done done) override {
    pool_->post(this, [=, done = std::move(done)] {
      const ssize_t got = ::pread(fd, target, size_bytes, static_cast<off_t>(offset));
      done(got < 0 ? -errno : got);
    });
  }

 private:
  const std::unique_ptr<ReadPool> pool_;
};

}  // namespace

Result<std::unique_ptr<DirectReader>> start_uring_reader() {
  auto reader = std::make_unique<UringReader>();
  TRY(reader->start());
  return reader;
}

Result<std::unique_ptr<DirectReader>> start_pread_reader(int thread_count) {
  TRY_ASSIGN(std::unique_ptr<ReadPool> pool, start_read_pool(thread_count));
  return std::make_unique<PreadReader>(std::move(pool));
}

}  // namespace tensord::storage
