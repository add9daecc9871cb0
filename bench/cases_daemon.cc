// attach, control, hot_load, memory: what the daemon does for clients.
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/text.h"
#include "bench/checkpoint.h"
#include "bench/measure.h"
#include "bench/processes.h"

namespace tensord::bench {

using base::kMiB;

namespace {

double seconds_since(int64_t begin_ns) { return static_cast<double>(base::monotonic_ns() - begin_ns) / 1e9; }

// ---- attach ------------------------------------------------------------------------------------------------

// In memory that all clients share: they begin each round together.
struct AttachBoard {
  pthread_barrier_t barrier;
  double times_ms[1];  // [client][round][opened, first byte read]
};

struct AttachTimes {
  std::vector<double> opened_ms;
  std::vector<double> read_ms;  // the same, until the first byte of a tensor is read
};

Status attach_rounds(const std::string& path, int round_count, AttachBoard& board, double* times_ms) {
  TRY(open_ready(path));  // this process's first: code and allocator are warm from here on
  for (int round = 0; round < round_count; ++round) {
    ::pthread_barrier_wait(&board.barrier);
    const int64_t begin_ns = base::monotonic_ns();
    TRY_ASSIGN(const auto model, client::Model::open({path}, {.autostart = client::Autostart::no}));
    *times_ms++ = seconds_since(begin_ns) * 1e3;
    const tensor::Tensor& first = model->index().tensors.front();
    TRY(model->wait(&first, -1));
    const auto byte = *static_cast<const volatile std::byte*>(model->data(first));
    static_cast<void>(byte);
    *times_ms++ = seconds_since(begin_ns) * 1e3;
  }
  return {};
}

Result<AttachTimes> attach_at_once(const std::string& path, int client_count, int round_count) {
  const uint64_t per_client = 2 * static_cast<uint64_t>(round_count);
  const uint64_t count = per_client * static_cast<uint64_t>(client_count);
  TRY_ASSIGN(const memory::Mapped shared, share_memory(sizeof(AttachBoard) + count * sizeof(double)));
  auto& board = *reinterpret_cast<AttachBoard*>(shared.data());
  double* const times_ms = board.times_ms;
  pthread_barrierattr_t attributes;
  ::pthread_barrierattr_init(&attributes);
  ::pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  ::pthread_barrier_init(&board.barrier, &attributes, static_cast<unsigned>(client_count));
  TRY(run_clients(client_count, [&](int client) {
    return attach_rounds(path, round_count, board, times_ms + static_cast<uint64_t>(client) * per_client);
  }));
  AttachTimes times;
  for (uint64_t at = 0; at < count; at += 2) {
    times.opened_ms.push_back(times_ms[at]);
    times.read_ms.push_back(times_ms[at + 1]);
  }
  return times;
}

Figure attach_figure(std::string name, const AttachTimes& times, std::optional<Goal> goal) {
  Figure figure{.name = std::move(name), .unit = "ms", .value = median(times.opened_ms), .goal = goal};
  figure.details = {{"p99_ms", quantile(times.opened_ms, 0.99)},
                    {"iqr", spread(times.opened_ms)},
                    {"first_byte_p50_ms", median(times.read_ms)},
                    {"first_byte_p99_ms", quantile(times.read_ms, 0.99)},
                    {"count", static_cast<double>(times.opened_ms.size())}};
  return figure;
}

// ---- hot_load ----------------------------------------------------------------------------------------------

// The file into memory that was touched before, by as many threads as the daemon has.
class RawReader {
 public:
  enum class Memory {
    shared,  // a memfd, as the daemon's segments are
    huge     // private to this process, in huge pages where the system gives them: nobody else could map it
  };
  static Result<RawReader> make(const std::string& path, int thread_count, Memory kind) {
    const bool anonymous = kind == Memory::huge;
    RawReader reader;
    reader.thread_count_ = thread_count;
    reader.file_.reset(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    TRY_ASSIGN(const base::FileIdentity identity, base::identify_file(reader.file_.get(), path));
    reader.path_ = path;
    const base::Fd memory(anonymous ? -1 : ::memfd_create("raw-reader", MFD_CLOEXEC));
    if (!anonymous && ::ftruncate(memory.get(), static_cast<off_t>(identity.size_bytes)) != 0) {
      return tl::unexpected(base::errno_error("make memory for the ceiling", errno));
    }
    const int flags = anonymous ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    void* data = ::mmap(nullptr, identity.size_bytes, PROT_READ | PROT_WRITE, flags, memory.get(), 0);
    if (data == MAP_FAILED) return tl::unexpected(base::errno_error("map memory for the ceiling", errno));
    reader.memory_ = memory::Mapped(static_cast<std::byte*>(data), identity.size_bytes);
    if (anonymous) ::madvise(data, identity.size_bytes, MADV_HUGEPAGE);
    std::memset(data, 1, identity.size_bytes);
    return reader;
  }

  Result<double> read(uint64_t piece_bytes) const {
    std::atomic<uint64_t> next{0};
    std::atomic<bool> failed{false};
    const double seconds = run_on_threads(thread_count_, [&] {
      for (uint64_t at; (at = next.fetch_add(piece_bytes)) < memory_.size_bytes();) {
        const uint64_t count = std::min(piece_bytes, memory_.size_bytes() - at);
        if (!base::read_exactly(file_.get(), at, {memory_.data() + at, count}, path_)) failed = true;
      }
    });
    if (failed) return base::fail(base::Code::unavailable, "read " + path_);
    return seconds;
  }

  const memory::Mapped& memory() const { return memory_; }

 private:
  base::Fd file_;
  std::string path_;
  memory::Mapped memory_;
  int thread_count_ = 1;
};

// Shares of the thread time of reading and checking that went into checking, load by load.
struct HotLoads {
  const Daemon& daemon;
  const std::string& path;
  std::vector<double> check_shares;
  std::vector<double> check_gb_s;

  // Evicts, so that the next load finds its segments in the pool, then opens and waits.
  Result<double> load() {
    TRY(daemon.evict(path));
    const int64_t begin_ns = base::monotonic_ns();
    TRY(open_ready(path));
    const double seconds = seconds_since(begin_ns);
    TRY_ASSIGN(const nlohmann::json report, daemon.ask(protocol::Verb::explain, "last"));
    double read_ns = 0, check_ns = 0;
    for (const auto& phase : report.at("phases")) {
      if (phase.at("name") == "read") read_ns = phase.at("thread_ns");
      if (phase.at("name") == "check") check_ns = phase.at("thread_ns");
    }
    check_shares.push_back(check_ns / (read_ns + check_ns));
    check_gb_s.push_back(report.at("bytes").get<double>() / check_ns);
    return seconds;
  }
};

// ---- memory ------------------------------------------------------------------------------------------------

struct ClientMemory {
  uint64_t before_bytes = 0, after_bytes = 0;
};

}  // namespace

Status run_attach(Bench& bench) {
  const Qwen large = large_qwen(bench);
  // The same tensors in a fortieth of the bytes, and those bytes in thirteen times as many tensors.
  Qwen small{.hidden = large.hidden / 5,
             .intermediate = large.intermediate / 17,
             .queries = large.queries / 5,
             .key_values = large.key_values / 4,
             .layers = 3,
             .vocabulary = 0};
  Qwen many = small;
  small.intermediate *= bench.tiny() ? 1 : 2;
  many.hidden /= 2;
  many.queries /= 2;
  many.layers = bench.tiny() ? 4 : 40;
  const std::pair<const char*, Qwen> files[] = {
      {"small.safetensors", small}, {"large.safetensors", large}, {"many.safetensors", many}};
  TRY_ASSIGN(const Daemon daemon, Daemon::start(bench.options()));
  for (const auto& [file, qwen] : files) {
    const auto shapes = qwen_shapes(qwen);
    TRY_ASSIGN(const std::string path, make_checkpoint(bench, file, shapes));
    TRY_ASSIGN(std::shared_ptr<client::Model> holder, open_ready(path));
    const auto named = [&](const std::string& name) {
      return base::text(holder->index().payload_bytes() / 1'000'000, " MB in ", shapes.size(), " tensors, ",
                        name);
    };
    const int client_count = bench.tiny() ? 4 : 100;
    TRY_ASSIGN(const AttachTimes alone, attach_at_once(path, 1, bench.tiny() ? 3 : 1000));
    bench.add(attach_figure(named("1 client"), alone, at_most(1)));
    {
      std::vector<std::shared_ptr<client::Model>> others;
      while (others.size() + 1 < static_cast<size_t>(client_count)) {
        TRY_ASSIGN(others.emplace_back(), open_ready(path));
      }
      TRY_ASSIGN(const AttachTimes beside, attach_at_once(path, 1, bench.tiny() ? 3 : 1000));
      bench.add(attach_figure(named(base::text("1 client beside ", others.size(), " that hold it")), beside,
                              at_most(1)));
    }
    TRY_ASSIGN(const AttachTimes burst, attach_at_once(path, client_count, bench.tiny() ? 2 : 20));
    Figure figure = attach_figure(named(base::text("burst of ", client_count, " clients")), burst, {});
    figure.details["clients_per_s"] = client_count / quantile(burst.opened_ms, 1) * 1e3;
    bench.add(std::move(figure));
  }
  return {};
}

Status run_control(Bench& bench) {
  TRY_ASSIGN(const Daemon daemon, Daemon::start(bench.options()));
  for (const int client_count : {1, 2, 8}) {
    const int64_t duration_ns = bench.tiny() ? 10'000'000 : 1'000'000'000;
    std::vector<double> rates;
    for (int round = 0; round < bench.options().pair_count; ++round) {
      TRY_ASSIGN(const memory::Mapped shared,
                 share_memory(sizeof(double) * static_cast<uint64_t>(client_count)));
      auto* const counts = reinterpret_cast<double*>(shared.data());
      const auto work = [&](int number) -> Status {
        TRY_ASSIGN(const auto connection, client::Connection::open(client::Autostart::no));
        const int64_t begin_ns = base::monotonic_ns();
        double count = 0;
        for (; base::monotonic_ns() - begin_ns < duration_ns; ++count) {
          protocol::RequestUnion request;
          request.Set(protocol::CallT{.verb = protocol::Verb::status});
          TRY(connection->ask(std::move(request), {}));
        }
        counts[number] = count / seconds_since(begin_ns);
        return {};
      };
      TRY(run_clients(client_count, work));
      rates.push_back(std::accumulate(counts, counts + client_count, 0.0));
    }
    Figure figure{.name = base::text(client_count, " clients, one request at a time"), .unit = "requests/s"};
    figure.value = median(rates);
    figure.spread = spread(rates);
    if (client_count == 8) figure.goal = at_least(20'000);
    bench.add(std::move(figure));
  }
  return {};
}

Status run_hot_load(Bench& bench) {
  const auto shapes = qwen_shapes(large_qwen(bench));
  TRY_ASSIGN(const std::string path, make_checkpoint(bench, "large.safetensors", shapes));
  TRY_ASSIGN(const Daemon daemon, Daemon::start(bench.options()));
  HotLoads loads{daemon, path, {}, {}};
  TRY(loads.load());  // makes the segments and the record of digests
  for (const auto memory : {RawReader::Memory::shared, RawReader::Memory::huge}) {
    TRY_ASSIGN(const RawReader reader, RawReader::make(path, daemon.read_thread_count(), memory));
    static constexpr uint64_t kPieces[] = {kMiB / 4, kMiB, 4 * kMiB, 16 * kMiB};
    std::vector<Act> ceilings;
    for (const uint64_t piece_bytes : kPieces)
      ceilings.push_back([&, piece_bytes] { return reader.read(piece_bytes); });
    TRY_ASSIGN(const Race raced, race(bench.options(), ceilings, [&] { return loads.load(); }));
    // The ceiling's memory now holds the file; so must the replica.
    TRY_ASSIGN(const auto model, open_ready(path));
    const uint64_t bytes = reader.memory().size_bytes();
    if (std::memcmp(model->mapping()->data(), reader.memory().data(), bytes) != 0) {
      return base::fail(base::Code::corrupt, path + ": the replica differs from the file");
    }
    const bool is_like = memory == RawReader::Memory::shared;
    Figure figure = race_figure(
        is_like ? "verified load, pread into a memfd" : "verified load, pread into private huge pages", raced,
        static_cast<double>(bytes), is_like ? std::optional(at_least(0.85)) : std::nullopt);
    figure.note = base::text("pieces of ", kPieces[raced.ceiling] / base::kKiB, " KiB");
    figure.details["threads"] = daemon.read_thread_count();
    bench.add(std::move(figure));
  }
  Figure share{.name = "verification", .unit = "of the load's thread time"};
  share.value = median(loads.check_shares);
  share.spread = spread(loads.check_shares);
  share.goal = at_most(0.10);
  share.details["check_gb_s_per_thread"] = median(loads.check_gb_s);
  bench.add(std::move(share));
  return {};
}

Status run_memory(Bench& bench) {
  const auto shapes = qwen_shapes(large_qwen(bench));
  TRY_ASSIGN(const std::string path, make_checkpoint(bench, "large.safetensors", shapes));
  TRY_ASSIGN(const Daemon daemon, Daemon::start(bench.options()));
  const uint64_t idle_bytes = process_bytes(daemon.pid(), "VmRSS");
  TRY_ASSIGN(const auto model, open_ready(path));
  const auto payload_bytes = static_cast<double>(model->index().payload_bytes());
  const auto peak_bytes = static_cast<double>(process_bytes(daemon.pid(), "VmHWM"));
  Figure daemons{.name = "daemon with a resident artifact, peak", .unit = "MiB over 1.02 x payload"};
  daemons.value = (peak_bytes - 1.02 * payload_bytes) / kMiB;
  daemons.goal = at_most(64);
  daemons.details = {{"rss_mib", peak_bytes / kMiB},
                     {"payload_mib", payload_bytes / kMiB},
                     {"idle_rss_mib", static_cast<double>(idle_bytes) / kMiB},
                     {"ratio", peak_bytes / payload_bytes}};
  bench.add(std::move(daemons));

  TRY_ASSIGN(const memory::Mapped shared, share_memory(sizeof(ClientMemory)));
  auto& client = *reinterpret_cast<ClientMemory*>(shared.data());
  TRY(run_clients(1, [&](int) -> Status {
    client.before_bytes = process_bytes(::getpid(), "VmRSS");
    TRY_ASSIGN(const auto untouched, open_ready(path));
    client.after_bytes = process_bytes(::getpid(), "VmRSS");
    return {};
  }));
  Figure clients{.name = "client that maps it and touches nothing, more than before", .unit = "MiB"};
  clients.value = static_cast<double>(client.after_bytes - client.before_bytes) / kMiB;
  clients.goal = at_most(20);
  clients.details["rss_mib"] = static_cast<double>(client.after_bytes) / kMiB;
  bench.add(std::move(clients));
  return {};
}

}  // namespace tensord::bench
