#include "daemon/serve.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <fstream>
#include <optional>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/folders.h"
#include "base/log.h"
#include "base/text.h"
#include "catalog/catalog.h"
#include "daemon/config.h"
#include "daemon/device_copies.h"
#include "daemon/keeper_link.h"
#include "daemon/machine.h"
#include "daemon/requests.h"
#include "rpc/index_rows.h"
#include "rpc/loop.h"
#include "rpc/server.h"
#include "storage/read_pool.h"

namespace tensord::daemon {

using base::log;
using base::LogLevel;
using base::Status;

namespace {

constexpr int64_t kFollowMs = 1'000;  // how often memory limits are looked at: nothing tells that they change

// How the descriptors of this process are shared out, so that it never runs out of them in the midst of something:
// 1/2 for replicas, 1/4 for leases, 1/8 for connections, 1/8 for replies on their way and all the rest. A replica has no
// more mappings than descriptors; they are held below 3/4 of what the kernel allows.
struct DescriptorShares {
  size_t replicas, leases, connections;
};

// A replica of 700 GB in segments is 1400 descriptors, and so is every client's request for it in flight.
DescriptorShares raise_descriptor_limit() {
  rlimit limit{1024, 1024};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  const rlimit raised{limit.rlim_max, limit.rlim_max};
  const size_t count = ::setrlimit(RLIMIT_NOFILE, &raised) == 0 ? limit.rlim_max : limit.rlim_cur;
  size_t mapping_count_max = 65530;  // the kernel's default
  std::ifstream("/proc/sys/vm/max_map_count") >> mapping_count_max;
  return {std::min(count / 2, mapping_count_max / 4 * 3), std::min(count / 4, engine::kLeaseCountMax),
          std::min(count / 8, rpc::kConnectionCountMax)};
}

// The default follows the limit it comes from; what was set stays below it.
void follow_limit(rpc::Loop& loop, engine::Engine& engine, const Config& config) {
  engine.set_host_memory(config.host_memory_is_default
                             ? default_host_memory()
                             : std::min(config.host_memory, most_within(cgroup_memory_limit())));
  loop.call_after(kFollowMs, [&] { follow_limit(loop, engine, config); });
}

// The parent ends once the child runs in a session of its own, in the folder /; the caller's terminal can go.
Status detach() {
  if (::daemon(0, 1) != 0) return base::fail_errno(errno, "go to the background");
  // Who reads this command's output is not to wait for the daemon's end. Log lines still go to standard error.
  const base::Fd nowhere(::open("/dev/null", O_RDWR | O_CLOEXEC));
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO}) {
    if (::dup2(nowhere.get(), stream) < 0) return base::fail_errno(errno, "let go of the terminal");
  }
  return {};
}

// Without a usable state folder the daemon still serves: loads are then not checked against earlier ones.
base::Result<std::unique_ptr<catalog::Catalog>> open_catalog(const std::string& state_dir) {
  Status folder = base::make_folders(state_dir);
  if (folder) {
    auto opened = catalog::Catalog::open(state_dir + "/catalog.sqlite");
    if (opened) return opened;
    folder = base::pass_on(opened);
  }
  log(LogLevel::warning, "catalog: ", folder.error().message,
      "; digests are kept in memory only, until the daemon ends");
  return catalog::Catalog::open(catalog::Catalog::kInMemory);
}

// Signals as a descriptor; blocked before any thread starts, so that all inherit it.
base::Result<base::Fd> catch_signals() {
  ::signal(SIGPIPE, SIG_IGN);
  sigset_t signals;
  ::sigemptyset(&signals);
  ::sigaddset(&signals, SIGTERM);
  ::sigaddset(&signals, SIGINT);
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  base::Fd fd(::signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!fd.valid()) return tl::unexpected(base::errno_error("catch signals", errno));
  return fd;
}

struct DirectReads {
  std::unique_ptr<storage::DirectReader> reader;  // nullptr: through the page cache
  std::string note;
};

// The reader that was asked for, or the best there is; only what was asked for by name must be had.
base::Result<DirectReads> start_direct_reads(DiskReads wanted) {
  if (wanted == DiskReads::buffered) return DirectReads{nullptr, "disk_reads is buffered: no O_DIRECT"};
  DirectReads reads;
  if (wanted != DiskReads::pread) {
    auto ring = storage::start_uring_reader();
    if (ring) return DirectReads{std::move(*ring), ""};
    if (wanted == DiskReads::io_uring) {
      return base::fail(ring.error().code, "disk_reads is io_uring: " + ring.error().message);
    }
    reads.note = ring.error().message + "; O_DIRECT reads are done by threads";
  }
  TRY_ASSIGN(reads.reader, storage::start_pread_reader());
  return reads;
}

// What was fastest when the doctor measured this machine; else by the instructions that its CPU has.
storage::CachedPath fastest_path(const std::string& state_dir) {
  using enum storage::CachedPath;
  const std::string fastest = fastest_cached_path(state_dir, this_machine());
  if (fastest.empty()) return storage::FileSourceOptions().cached_path;
  if (fastest == "cache_pread" || !base::can_stream()) return plain;
  return fastest == "cache_mapped" ? mapped : stream;
}

std::optional<memory::Segment> touched_segment(uint64_t size, memory::HugePages huge) {
  auto segment = memory::make_segment(size, ::getuid());
  if (!segment) return std::nullopt;
  memory::FreshPages({&*segment, 1}, size, huge).prepare(0, size);
  if (::madvise(segment->data(), size, MADV_POPULATE_WRITE) != 0) return std::nullopt;
  segment->set_touched(size);
  return std::move(*segment);
}

// Touches memory for loads to come, segment by segment: the loop claims room, `thread` touches it. `sizes` are still to
// be touched, the largest first.
void prefault(rpc::Loop& loop, engine::Engine& engine, storage::ReadPool& thread, memory::HugePages huge,
              std::vector<uint64_t> sizes) {
  if (sizes.empty()) return;
  const uint64_t size = sizes.back();
  sizes.pop_back();
  if (!engine.claim_memory(size)) return log(LogLevel::info, "prefault: ends early, loads need the memory");
  thread.post(&engine, [&, huge, size, sizes = std::move(sizes)] {
    // Shared, because work can be copied.
    auto segment = std::make_shared<std::optional<memory::Segment>>(touched_segment(size, huge));
    loop.post([&, huge, size, sizes, segment] {
      const bool touched = segment->has_value();
      engine.settle_claim(size, std::move(*segment));
      if (touched) return prefault(loop, engine, thread, huge, sizes);
      log(LogLevel::warning, "prefault: ", base::human_bytes(size), " could not be had; the rest is left out");
    });
  });
}

engine::Owner owner_over(rpc::Loop& loop) {
  return {.post = [&loop](std::function<void()> work) { loop.post(std::move(work)); },
          .watch_hangup =
              [&loop](int fd, std::function<void()> gone) {
                return loop.watch(fd, 0, [gone = std::move(gone)](uint32_t) { gone(); });
              },
          .unwatch = [&loop](int fd) { loop.unwatch(fd); },
          .call_after = [&loop](int64_t delay_ms,
                                std::function<void()> work) { loop.call_after(delay_ms, std::move(work)); }};
}

engine::EngineOptions engine_options(const Config& config, const DirectReads& direct, const DescriptorShares& shares) {
  return {.host_memory_bytes = config.host_memory,
          .device_memory_bytes = config.gpu_memory,
          .keep_spans = base::log_enabled(LogLevel::debug),
          .encode_index = rpc::encode_index,
          .reads = {.direct = direct.reader.get(),
                    .direct_note = direct.note,
                    .cached_path = fastest_path(config.state_dir),
                    .cache_left = config.cache},
          .huge_pages = config.huge_pages,
          .memory_wait_ms = config.memory_wait_seconds * 1000,
          .descriptor_count_max = shares.replicas,
          .lease_count_max = shares.leases};
}

constexpr int64_t kHungReadMs = 3000;

// First call: no new loads, those that run may finish for a while. Second call: they are cancelled now.
class Shutdown {
 public:
  Shutdown(rpc::Loop& loop, engine::Engine& engine, int64_t drain_seconds)
      : loop_(loop), engine_(engine), drain_seconds_(drain_seconds) {}

  void watch(rpc::Server& server) { server_ = &server; }

  void begin() {
    if (begun_) return cancel();
    begun_ = true;
    log(LogLevel::info, "stopping: ", engine_.running_count(), " loads run, they have ", drain_seconds_, " s");
    server_->stop_accepting();
    loop_.call_after(drain_seconds_ * 1000, [this] { cancel(); });
    // Through the loop once more, so that the reply to `stop` is on its way first.
    engine_.drain([this] { loop_.post([this] { loop_.stop(); }); });
  }

 private:
  void cancel() {
    engine_.cancel_all();
    // A read that hangs in the kernel cannot be cancelled. Nothing that stays behind needs an orderly end.
    loop_.call_after(kHungReadMs, [] {
      log(LogLevel::warning, "stopped while a read hangs");
      ::_exit(1);
    });
  }

  rpc::Loop& loop_;
  engine::Engine& engine_;
  const int64_t drain_seconds_;
  rpc::Server* server_ = nullptr;
  bool begun_ = false;
};

void log_start(const std::string& socket, const engine::Engine& engine, const Config& config) {
  log(LogLevel::info, "tensord ", TENSORD_VERSION, " listens at ", socket, ", pid ", ::getpid(), ", host_memory ",
      base::human_bytes(engine.memory().limit_bytes()), ", ", config.read_threads, " read threads");
}

Status run(const Config& config) {
  TRY(rpc::prepare_runtime_folder(config.runtime_dir));
  TRY_ASSIGN(rpc::Listener listener, rpc::Listener::open(config.runtime_dir));
  TRY_ASSIGN(const base::Fd signals, catch_signals());
  const DescriptorShares shares = raise_descriptor_limit();
  const std::string socket = listener.path();
  TRY_ASSIGN(const std::unique_ptr<catalog::Catalog> catalog, open_catalog(config.state_dir));
  TRY_ASSIGN(const std::unique_ptr<rpc::Loop> loop, rpc::Loop::open());
  TRY_ASSIGN(const std::unique_ptr<storage::ReadPool> pool, storage::start_read_pool(config.read_threads));
  TRY_ASSIGN(const std::unique_ptr<storage::ReadPool> catalog_thread, storage::start_read_pool(1));
  TRY_ASSIGN(const DirectReads direct, start_direct_reads(config.disk_reads));
  if (!direct.note.empty()) log(LogLevel::info, direct.note);
  engine::Engine engine(engine_options(config, direct, shares), *catalog, *catalog_thread, *pool, owner_over(*loop));
  Shutdown shutdown(*loop, engine, config.drain_seconds);
  DeviceCopies devices(engine, *loop, {config.gpu, config.gpu_idle_seconds * 1000});
  engine.use_devices(devices);
  KeeperLink keeper(engine, *loop, config.runtime_dir);
  Requests requests(engine, devices, config, shares.connections, [&] { shutdown.begin(); });
  const auto closed = [&](rpc::ConnectionId id) {
    loop->post([&, id] {
      engine.withdraw(id);
      devices.forget(id);
      keeper.closed(id);
    });
  };
  rpc::Server server(*loop, std::move(listener),
                     {.product_version = TENSORD_VERSION,
                      .keep_spans = base::log_enabled(LogLevel::debug),
                      .user_id = ::getuid(),
                      .connection_count_max = shares.connections,
                      .closed = closed},
                     [&](rpc::Request request) { requests.handle(std::move(request)); });
  requests.reply_through(server);
  shutdown.watch(server);
  keeper.start(server);
  TRY(server.listen());
  TRY(loop->watch(signals.get(), EPOLLIN, [&](uint32_t) {
    signalfd_siginfo info;
    while (::read(signals.get(), &info, sizeof info) == sizeof info) shutdown.begin();
  }));
  follow_limit(*loop, engine, config);
  std::unique_ptr<storage::ReadPool> prefault_thread;
  if (config.prefault > 0) {
    TRY_ASSIGN(prefault_thread, storage::start_read_pool(1));
    prefault(*loop, engine, *prefault_thread, config.huge_pages, memory::segment_sizes(config.prefault));
  }
  log_start(socket, engine, config);
  loop->run();
  loop->drain();
  loop->unwatch(signals.get());
  log(LogLevel::info, "stopped");
  return {};
}

int complain(const base::Error& error, int status) {
  std::fprintf(stderr, "tensord: serve: %s\n", error.message.c_str());
  return status;
}

}  // namespace

int serve_main(int argc, char** argv) {
  const auto command_line = parse_command_line({argv + 1, static_cast<size_t>(argc - 1)});
  if (!command_line) return complain(command_line.error(), 2);
  if (command_line->help) {
    std::fputs(serve_help().c_str(), stdout);
    return 0;
  }
  const auto config = make_config(*command_line);
  if (!config) return complain(config.error(), 2);
  if (const Status started = base::start_log(config->log_level, config->log_file); !started) {
    return complain(started.error(), 1);
  }
  if (command_line->detach) {
    if (const Status detached = detach(); !detached) return complain(detached.error(), 1);
  }
  const Status done = run(*config);
  return done ? 0 : complain(done.error(), 1);
}

}  // namespace tensord::daemon
