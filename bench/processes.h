// The processes of a measurement: a daemon with folders of its own, and clients.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "bench/bench.h"
#include "client/model.h"

namespace tensord::bench {

// `tensord serve` with default settings, as a child of this process, which becomes its client by environment. Ends
// with the object, by process id; and with this process, whatever ends that.
class Daemon {
 public:
  static Result<Daemon> start(const Options& options);
  Daemon(Daemon&& other) noexcept : pid_(std::exchange(other.pid_, -1)), folder_(std::move(other.folder_)) {}
  Daemon& operator=(Daemon&&) = delete;
  ~Daemon();

  pid_t pid() const { return pid_; }
  Result<nlohmann::json> ask(protocol::Verb verb, const std::string& selector) const;
  int read_thread_count() const;

  // Evicts what was loaded from `path`, once the leases of clients that are gone have ended.
  Status evict(const std::string& path) const;

 private:
  Daemon(pid_t pid, std::string folder) : pid_(pid), folder_(std::move(folder)) {}
  pid_t pid_;
  std::string folder_;
};

// Opens `path` and waits until all of it is there.
Result<std::shared_ptr<client::Model>> open_ready(const std::string& path);

// Runs `work(number)` in `count` forked processes at once and waits for them; an error when one fails. Call it while
// this process has one thread.
Status run_clients(int count, const std::function<Status(int number)>& work);

// Memory that forked clients share with this process, of zeros.
Result<memory::Mapped> share_memory(uint64_t size_bytes);

// Of /proc/PID/status in bytes: "VmRSS", "VmHWM". 0 when it cannot be read.
uint64_t process_bytes(pid_t pid, const std::string& field);

// Page faults so far, minor and major, of all threads.
uint64_t fault_count(pid_t pid);

}  // namespace tensord::bench
