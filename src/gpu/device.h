// Device: one GPU as the daemon uses it: a thread that opens its clients' memory and keeps its copy engines busy.
//
//   jobs, in turn ──► pieces that are there ──► chunks of 128 MiB, on two streams ──► retired in order
//
// A job whose bytes are still being read lets others pass. The thread sleeps while chunks are under way. A client's memory is
// open for one job: what it frees stays taken as long as it is open here, and opening costs little (36 us for 2 MiB, 0.5 ms for
// 16 GiB; H100).
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "gpu/copy_job.h"
#include "gpu/pinned.h"
#include "gpu/target_memory.h"

namespace tensord::gpu {

class Device {
 public:
  // `number` is the driver's. After `idle_ms` without a job all that it holds of the device's memory is given back, and
  // host memory is unregistered.
  Device(const Driver& driver, int number, int64_t idle_ms);
  ~Device();  // jobs end with Code::cancelled

  // All thread safe, none waits.
  void submit(std::unique_ptr<CopyJob> job);
  // make_memory() on the device's thread, where `done` is called.
  using MadeMemory = Result<std::vector<std::pair<base::Fd, uint64_t>>>;
  void make(uint64_t size_bytes, std::function<void(MadeMemory)> done);
  void cancel(uint64_t client, uint64_t number);  // nothing when it is over
  void forget(uint64_t client);                   // it is gone: its jobs end

 private:
  using Owned = std::unique_ptr<void, Answer (*)(Handle)>;  // a stream or an event, with what ends it
  struct Running;
  // Pieces under way on one stream, and the event behind them.
  struct Chunk {
    Handle event = nullptr;
    std::shared_ptr<Running> running;
    uint64_t image_end = 0;  // of its last piece
  };
  struct Batch;

  void call(std::function<void()> work);  // on the thread
  void run();
  bool take_calls();
  void step();
  Status wake_up();
  Status take_device();
  void rest();
  void start(std::unique_ptr<CopyJob> job);
  Status open_source(Running& running);
  void end_jobs(const std::function<bool(const CopyJob&)>& which, const base::Error& why);
  Result<bool> issue_chunk(const std::shared_ptr<Running>& running);
  Result<bool> is_ready(Running& running, const Piece& piece);
  Status prepare(Running& running, const Piece& piece, Address& target, Address& source);
  Status issue(Running& running, const Piece& piece, Batch& batch, Handle stream);
  Status copy(const Running& running, Address target, Address source, uint64_t size_bytes, Handle stream);
  Status flush(Running& running, Batch& batch, Handle stream);
  Status close_chunk(const std::shared_ptr<Running>& running, Handle stream, uint64_t image_end);
  void retire_oldest();
  void finish_if_over(const std::shared_ptr<Running>& running);
  void restart(const base::Error& why);

  const Driver& driver_;
  const int number_;
  const int64_t idle_ms_;

  // The thread's own:
  std::shared_ptr<Primary> primary_;  // while awake, as the next two
  std::vector<Owned> streams_;
  std::vector<Owned> events_;  // chunks take turns: they end in order, and no more are under way
  size_t chunk_count_ = 0;     // so far
  std::deque<Chunk> chunks_;   // under way, oldest first
  std::deque<std::shared_ptr<Running>> running_;
  std::vector<std::weak_ptr<memory::AttachmentSlot>> pinned_;

  base::Mutex mutex_;
  std::condition_variable called_;
  std::deque<std::function<void()>> calls_ GUARDED_BY(mutex_);
  bool stopping_ GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: it uses all the others
};

}  // namespace tensord::gpu
