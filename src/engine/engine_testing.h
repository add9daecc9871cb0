// An engine for tests: the test itself is the owner's thread.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <fstream>
#include <map>
#include <mutex>
#include <random>

#include "catalog/catalog_testing.h"
#include "engine/engine.h"

namespace tensord::engine {

using base::Code;

// The owner's thread of a test: the test itself, which runs posted work until something has come true.
class TestOwner {
 public:
  Owner owner() {
    return {.post = [this](std::function<void()> work) { post(std::move(work)); },
            .watch_hangup =
                [this](int fd, std::function<void()> gone) {
                  hangups_[fd] = std::move(gone);
                  return Status();
                },
            .unwatch = [this](int fd) { hangups_.erase(fd); },
            .call_after =
                [this](int64_t delay_ms, std::function<void()> work) {
                  timers_.emplace(Clock::now() + std::chrono::milliseconds(delay_ms), std::move(work));
                }};
  }

  void post(std::function<void()> work) {
    std::unique_lock lock(mutex_);
    posted_.push_back(std::move(work));
    changed_.notify_one();
  }

  void run_until(const std::function<bool()>& reached) {
    while (!reached()) run_one();
  }

  // Waits for work, or for a timer, and runs it.
  void run_one() {
    std::function<void()> work;
    {
      std::unique_lock lock(mutex_);
      while (posted_.empty() && !is_due()) {
        if (timers_.empty()) {
          changed_.wait(lock);
        } else {
          changed_.wait_until(lock, timers_.begin()->first);
        }
      }
      if (posted_.empty()) {
        work = std::move(timers_.extract(timers_.begin()).mapped());
      } else {
        work = std::move(posted_.front());
        posted_.pop_front();
      }
    }
    work();
  }

  void run_for(size_t count) {
    while (count-- > 0) {
      post([] {});  // so that there is something
      run_one();
    }
  }

  void hang_up(int fd) { std::function<void()>(hangups_.at(fd))(); }
  void hang_up_all() {
    while (!hangups_.empty()) hang_up(hangups_.begin()->first);
  }

 private:
  using Clock = std::chrono::steady_clock;
  bool is_due() const { return !timers_.empty() && timers_.begin()->first <= Clock::now(); }

  std::multimap<Clock::time_point, std::function<void()>> timers_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> posted_;
  std::map<int, std::function<void()>> hangups_;
};

class EngineTest : public testing::Test {
 protected:
  explicit EngineTest(int64_t memory_wait_ms = 0)
      : catalog_thread_(storage::start_read_pool(1).value()),
        pool_(storage::start_read_pool(2).value()),
        engine_(
            {.host_memory_bytes = 8 << 20,
             .encode_index =
                 [](const tensor::Index&) { return Result<base::Fd>(base::Fd(::memfd_create("index", MFD_CLOEXEC))); },
             .memory_wait_ms = memory_wait_ms,
             .descriptor_count_max = 32},
            *catalog_, *catalog_thread_, *pool_, owner_.owner()) {
    std::string name = "/tmp/tensord-engine-test-XXXXXX";
    folder_ = ::mkdtemp(name.data());
  }
  ~EngineTest() override {
    owner_.run_until([&] { return engine_.running_count() == 0; });
    std::system(("rm -rf " + folder_).c_str());
  }

  // A file with U8 tensors of `size_bytes` pseudo-random bytes each: one, "w", or several, "w0", "w1", ...
  std::string write(const std::string& name, size_t size_bytes, unsigned seed = 1, int count = 1) {
    const std::string path = folder_ + "/" + name;
    std::string header = "{";
    for (int at = 0; at < count; ++at) {
      const std::string tensor = count == 1 ? "w" : "w" + std::to_string(at);
      header += (at == 0 ? "\"" : ",\"") + tensor + R"(":{"dtype":"U8","shape":[)" + std::to_string(size_bytes) +
                R"(],"data_offsets":[)" + std::to_string(at * size_bytes) + "," +
                std::to_string((at + 1) * size_bytes) + "]}";
    }
    header += "}";
    std::mt19937 random(seed);
    std::string bytes(size_bytes * static_cast<size_t>(count), '\0');
    for (char& byte : bytes) byte = static_cast<char>(random());
    const uint64_t header_bytes = header.size();
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(&header_bytes), 8);
    file << header << bytes;
    return path;
  }

  OpenOrder order(const std::string& path, bool index_only = false) {
    OpenOrder order{.path = path, .index_only = index_only, .holder = {77, 0, "test"}};
    base::Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    const base::FileIdentity identity = base::identify_file(fd.get(), path).value();
    order.files.push_back({std::move(fd), path, identity});
    return order;
  }

  Result<Grant> open(const std::string& path, bool index_only = false) {
    std::optional<Result<Grant>> granted;
    engine_.open(order(path, index_only), [&](Result<Grant> grant) { granted = std::move(grant); });
    owner_.run_until([&] { return granted.has_value(); });
    return std::move(*granted);
  }

  Result<Grant> load(const std::string& path) {
    Result<Grant> granted = open(path);
    owner_.run_until([&] { return engine_.running_count() == 0; });
    return granted;
  }

  using Granted = std::shared_ptr<std::optional<Result<Grant>>>;
  // Asks what may be answered later.
  Granted ask(OpenOrder order) {
    auto granted = std::make_shared<std::optional<Result<Grant>>>();
    engine_.open(std::move(order), [granted](Result<Grant> grant) { *granted = std::move(grant); });
    return granted;
  }
  Granted ask(const std::string& path, pid_t process_id, uint64_t asker = 0) {
    OpenOrder asked = order(path);
    asked.holder.process_id = process_id;
    asked.holder.asker = asker;
    return ask(std::move(asked));
  }
  Granted ask_batch(const std::string& path, const std::string& only, Stay stay, pid_t process_id) {
    OpenOrder asked = order(path);
    asked.only = {only};
    asked.stay = stay;
    asked.holder.process_id = process_id;
    return ask(std::move(asked));
  }
  // What it was answered.
  Result<Grant>& answer(const Granted& granted) {
    owner_.run_until([&] { return granted->has_value(); });
    return **granted;
  }
  uint64_t replica_of(const Granted& granted) { return answer(granted).value().replica; }
  void run_until_waiting(size_t count) {
    owner_.run_until([&] { return engine_.waiting_count() == count; });
  }
  void run_until_idle() {
    owner_.run_until([&] { return engine_.running_count() == engine_.waiting_count(); });
  }
  void let_go(uint64_t replica) {
    std::vector<int> fds;
    for (const auto& [number, lease] : engine_.replica(replica).leases) fds.push_back(lease.read_end.get());
    for (const int fd : fds) owner_.hang_up(fd);
  }

  TestOwner owner_;
  catalog::ScratchFolder catalog_folder_;
  std::unique_ptr<catalog::Catalog> catalog_ = catalog::Catalog::open(catalog_folder_.file("catalog")).value();
  std::unique_ptr<storage::ReadPool> catalog_thread_;
  std::unique_ptr<storage::ReadPool> pool_;
  Engine engine_;
  std::string folder_;
};

}  // namespace tensord::engine
