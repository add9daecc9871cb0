// attach, first_tensor, control, memory: what the daemon does for clients.
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
#include "bench/gather.h"
#include "bench/measure.h"
#include "bench/peer.h"
#include "bench/processes.h"
#include "bench/raw_reader.h"

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
  make_barrier(board.barrier, client_count);
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

// ---- memory ------------------------------------------------------------------------------------------------

struct ClientMemory {
  uint64_t before_bytes = 0, after_bytes = 0;
};

uint64_t sum_shared_bytes(std::span<const pid_t> pids) {
  uint64_t sum = 0;
  for (const pid_t pid : pids) sum += shared_bytes(pid);
  return sum;
}

Figure memory_figure(std::string who, int count, uint64_t added_bytes, uint64_t payload_bytes) {
  Figure figure{.name = base::text(count, " processes, ", who), .unit = "of the payload"};
  figure.value = static_cast<double>(added_bytes) / static_cast<double>(payload_bytes);
  figure.details["mib_per_process"] = static_cast<double>(added_bytes) / count / kMiB;
  return figure;
}

// What `count` clients add to the memory of the machine, the daemon's share included, when each has read every byte.
Status add_client_memory(Bench& bench, const Daemon& daemon, const std::string& path, int count) {
  TRY_ASSIGN(const memory::Mapped shared, share_memory(sizeof(pthread_barrier_t)));
  auto& barrier = *reinterpret_cast<pthread_barrier_t*>(shared.data());
  make_barrier(barrier, count + 1);
  TRY_ASSIGN(Clients clients, Clients::start(count, [&](int) -> Status {
               ::pthread_barrier_wait(&barrier);  // all have begun
               ::pthread_barrier_wait(&barrier);  // and were measured
               const auto model = open_ready(path);
               if (model) touch((*model)->mapping()->data(), (*model)->image_bytes());
               ::pthread_barrier_wait(&barrier);
               ::pthread_barrier_wait(&barrier);
               return model ? Status() : base::pass_on(model);
             }));
  ::pthread_barrier_wait(&barrier);
  const uint64_t before_bytes = sum_shared_bytes(clients.pids());
  ::pthread_barrier_wait(&barrier);
  ::pthread_barrier_wait(&barrier);
  const uint64_t after_bytes = sum_shared_bytes(clients.pids()) + shared_bytes(daemon.pid());
  ::pthread_barrier_wait(&barrier);
  TRY(clients.wait());
  TRY_ASSIGN(const auto model, open_ready(path));
  const uint64_t payload_bytes = model->index().payload_bytes();
  Figure figure = memory_figure("tensord, daemon included", count, after_bytes - before_bytes, payload_bytes);
  figure.goal = at_most(1.02 + 64.0 * kMiB / static_cast<double>(payload_bytes));
  bench.add(std::move(figure));
  return {};
}

// The same of a peer. Page cache counts where it is mapped.
Status add_peer_memory(Bench& bench, const std::string& name, const std::string& path, int count) {
  const std::string who = base::text(count, " processes, ", name);
  TRY_ASSIGN(const memory::Mapped file, map_file(path));
  if (name.find("mapped") == name.npos && static_cast<uint64_t>(count) * file.size_bytes() > available_bytes() / 3) {
    bench.skip(who, "needs more memory than this machine should give");
    return {};
  }
  std::vector<pid_t> pids;
  for (int number = 0; number < count; ++number) {
    TRY_ASSIGN(Peer * peer, bench.peer(name, number));
    // Imports are not what is asked for.
    TRY(peer->ask({{"act", "load"}, {"path", path}}));
    pids.push_back(peer->pid());
  }
  const uint64_t before_bytes = sum_shared_bytes(pids);
  for (int number = 0; number < count; ++number) {
    TRY_ASSIGN(Peer * peer, bench.peer(name, number));
    TRY(peer->ask({{"act", "hold"}, {"path", path}}));
  }
  bench.add(memory_figure(name, count, sum_shared_bytes(pids) - before_bytes, file.size_bytes()));
  return bench.drop_peers();
}

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
      return base::text(holder->index().payload_bytes() / 1'000'000, " MB in ", shapes.size(), " tensors, ", name);
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
      bench.add(
          attach_figure(named(base::text("1 client beside ", others.size(), " that hold it")), beside, at_most(1)));
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
    const int64_t duration_ns = bench.tiny() ? 10'000'000 : 300'000'000;
    std::vector<double> rates;
    for (int round = 0; round < bench.options().pair_count; ++round) {
      TRY_ASSIGN(const memory::Mapped shared, share_memory(sizeof(double) * static_cast<uint64_t>(client_count)));
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

Status run_first_tensor(Bench& bench) {
  const auto shapes = qwen_shapes(cold_qwen(bench));
  TRY_ASSIGN(const std::string path, make_checkpoint(bench, "cold.safetensors", shapes));
  TRY_ASSIGN(const Daemon daemon, Daemon::start(bench.options()));
  const TensorShape& first = shapes.front();
  for (const bool is_cold : {false, true}) {
    const auto before = [&]() -> Status {
      TRY(daemon.evict(path));
      return is_cold ? drop_cache(path) : Status();
    };
    if (const Status able = before(); !able) {
      bench.skip("cold", able.error().message);
      break;
    }
    const auto product = [&]() -> Result<Sample> {
      TRY(before());
      const Stopwatch stopwatch({daemon.pid()});
      TRY_ASSIGN(const auto model, client::Model::open({path}, {.autostart = client::Autostart::no}));
      TRY_ASSIGN(const tensor::Tensor* tensor, model->find(first.name));
      TRY(model->wait(tensor, -1));
      touch(model->data(*tensor), tensor->size_bytes);
      const Sample sample = stopwatch.read();
      TRY(model->wait(nullptr, -1));  // or the rest of the load would run beside the next one
      return sample;
    };
    // The first tensor of the file lies right behind its header.
    const Contender ceilings[] = {
        {"pread of header and tensor", [&]() -> Result<Sample> {
           TRY(before());
           const Stopwatch stopwatch;
           const base::Fd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
           uint64_t length = 0;
           TRY(base::read_exactly(file.get(), 0, std::as_writable_bytes(std::span(&length, 1)), path));
           std::vector<std::byte> bytes(length + first.size_bytes());
           TRY(base::read_exactly(file.get(), 8, bytes, path));
           return stopwatch.read();
         }}};
    const auto peers = peer_acts(bench, daemon, {{"act", "first"}, {"path", path}, {"name", first.name}}, before, 0);
    TRY_ASSIGN(const Race raced, race(bench.options(), ceilings, product, peers));
    bench.add(time_figure(base::text("first of ", shapes.size(), " tensors, ", is_cold ? "cold" : "hot page cache"),
                          raced, {}));
  }
  TRY_ASSIGN(const auto holder, open_ready(path));
  const int rounds = bench.tiny() ? 3 : 200;
  constexpr int kRanks = 4;
  TRY_ASSIGN(const AttachTimes times, attach_at_once(path, kRanks, rounds));
  std::vector<double> last_ms(static_cast<size_t>(rounds));  // of the four
  for (size_t at = 0; at < times.read_ms.size(); ++at) {
    double& last = last_ms[at % last_ms.size()];
    last = std::max(last, times.read_ms[at]);
  }
  Figure figure{.name = "resident: the last of 4 processes that attach at once", .unit = "ms"};
  figure.value = median(last_ms);
  figure.goal = at_most(2);
  figure.details = {{"p99_ms", quantile(last_ms, 0.99)}, {"iqr", spread(last_ms)}};
  bench.add(std::move(figure));
  return {};
}

Status run_memory(Bench& bench) {
  const auto shapes = qwen_shapes(cold_qwen(bench));
  TRY_ASSIGN(const std::string path, make_checkpoint(bench, "cold.safetensors", shapes));
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

  for (const int count : {1, 4, 8}) {
    if (bench.tiny() && count > 1) break;
    TRY(add_client_memory(bench, daemon, path, count));
    for (const std::string& name : bench.options().peers) {
      if (!bench.options().python.empty() && name.starts_with("safetensors"))
        TRY(add_peer_memory(bench, name, path, count));
    }
  }
  return {};
}

}  // namespace tensord::bench
