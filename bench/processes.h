// The processes of a measurement: a daemon with folders of its own, and clients.
#pragma once

#include <pthread.h>
#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

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
  // What a process needs to become this daemon's client.
  nlohmann::json environment() const;
  Result<nlohmann::json> ask(protocol::Verb verb, const std::string& selector) const;
  int read_thread_count() const;

  // From the disk so far.
  uint64_t disk_bytes() const;

  // Evicts what was loaded from `path`, once the leases of clients that are gone have ended.
  Status evict(const std::string& path) const;

 private:
  Result<std::string> replica_of(const std::string& path) const;  // its number
  Daemon(pid_t pid, std::string folder) : pid_(pid), folder_(std::move(folder)) {}
  pid_t pid_;
  std::string folder_;
};

// Opens `path` and waits until all of it is there.
Result<std::shared_ptr<client::Model>> open_ready(const std::string& path);

// Forked processes, each running `work(number)`. Start them while this process has one thread. What still runs when
// the object goes is killed.
class Clients {
 public:
  static Result<Clients> start(int count, const std::function<Status(int number)>& work);
  Clients(Clients&& other) noexcept : children_(std::exchange(other.children_, {})) {}
  Clients& operator=(Clients&&) = delete;
  ~Clients();
  const std::vector<pid_t>& pids() const { return children_; }
  // An error when one of them failed.
  Status wait();

 private:
  Clients() = default;
  std::vector<pid_t> children_;
};

// Clients::start and wait.
Status run_clients(int count, const std::function<Status(int number)>& work);

// A barrier in memory that clients share.
void make_barrier(pthread_barrier_t& barrier, int process_count);

// Touches memory and gives it back: what needs fresh memory right after this (the page cache of a buffered read, too)
// does not wait for a host to whom the machine had reported it as free.
void touch_free_memory(uint64_t size_bytes);

// Memory that forked clients share with this process, of zeros.
Result<memory::Mapped> share_memory(uint64_t size_bytes);

// Of /proc/PID/status in bytes: "VmRSS", "VmHWM". 0 when it cannot be read.
uint64_t process_bytes(pid_t pid, const std::string& field);

// Proportional set size: pages shared by n processes count for an n-th each. 0 when it cannot be read.
uint64_t shared_bytes(pid_t pid);

// What the machine could still give to processes, page cache included.
uint64_t available_bytes();

// Page faults so far, minor and major, of all threads.
uint64_t fault_count(pid_t pid);

}  // namespace tensord::bench
