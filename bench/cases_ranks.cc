// ranks: several processes copy their column slices out of one replica at once.
#include <atomic>

#include "base/clock.h"
#include "base/text.h"
#include "bench/checkpoint.h"
#include "bench/gather.h"
#include "bench/peer.h"
#include "bench/processes.h"

namespace tensord::bench {

namespace {

constexpr int kProcessesMax = 8;
constexpr int kProduct = -1, kStop = -2;  // other commands are numbers of loops

// In memory that all ranks share: told what to do they begin together.
struct RankBoard {
  pthread_barrier_t barrier;
  int command;
  struct {
    int64_t begin_ns, end_ns;
    double cpu_s;
    bool failed;
  } ranks[kProcessesMax];
};

Status run_rank(const std::string& path, const std::vector<Slice>& slices, int number, RankBoard& board) {
  Result<Gather> gather = [&]() -> Result<Gather> {
    TRY_ASSIGN(auto model, open_ready(path));
    TRY_ASSIGN(Gather made, Gather::make(std::move(model), slices));
    TRY(made.check(path));
    return made;
  }();
  auto& rank = board.ranks[number];
  // One that failed goes on to take part, or the others would wait for it.
  for (rank.failed = !gather;;) {
    ::pthread_barrier_wait(&board.barrier);
    if (board.command == kStop) return gather ? Status() : base::pass_on(gather);
    if (gather) {
      rank.begin_ns = base::monotonic_ns();
      const auto sample =
          board.command == kProduct ? gather->run_product() : gather->run_loop(static_cast<size_t>(board.command));
      rank.end_ns = base::monotonic_ns();
      if (sample) rank.cpu_s = sample->cpu_s;
      rank.failed |= !sample;
    }
    ::pthread_barrier_wait(&board.barrier);
  }
}

Result<Sample> command(RankBoard& board, int count, int what) {
  board.command = what;
  ::pthread_barrier_wait(&board.barrier);
  if (what == kStop) return Sample(0);
  ::pthread_barrier_wait(&board.barrier);
  int64_t begin_ns = INT64_MAX, end_ns = 0;
  double cpu_s = 0;
  for (int number = 0; number < count; ++number) {
    const auto& rank = board.ranks[number];
    if (rank.failed) return base::fail(base::Code::internal, base::text("rank ", number, " failed"));
    begin_ns = std::min(begin_ns, rank.begin_ns);
    end_ns = std::max(end_ns, rank.end_ns);
    cpu_s += rank.cpu_s;
  }
  return Sample(static_cast<double>(end_ns - begin_ns) / 1e9, cpu_s);
}

Status race_ranks(Bench& bench, const Daemon& daemon, const std::string& path,
                  const std::vector<std::vector<Slice>>& slices, const std::string& name) {
  const int count = static_cast<int>(slices.size());
  TRY_ASSIGN(const memory::Mapped shared, share_memory(sizeof(RankBoard)));
  auto& board = *reinterpret_cast<RankBoard*>(shared.data());
  make_barrier(board.barrier, count + 1);
  TRY_ASSIGN(Clients clients, Clients::start(count, [&](int number) {
               return run_rank(path, slices[static_cast<size_t>(number)], number, board);
             }));
  std::vector<Contender> loops;
  for (size_t loop = 0; loop < row_loops().size(); ++loop) {
    loops.push_back({base::text("loop of ", row_loops()[loop]),
                     [&board, count, loop] { return command(board, count, static_cast<int>(loop)); }});
  }
  const auto peers = slice_peers(bench, daemon, path, slices);
  const auto raced = race(
      bench.options(), loops, [&] { return command(board, count, kProduct); }, peers);
  TRY(command(board, count, kStop));
  TRY(clients.wait());
  TRY(raced);
  double bytes = 0;
  for (const auto& own : slices) bytes += static_cast<double>(packed_bytes(own));
  bench.add(race_figure(name, *raced, bytes, at_least(0.90)));
  return bench.drop_peers();
}

}  // namespace

Status run_ranks(Bench& bench) {
  const auto shapes = qwen_shapes(large_qwen(bench));
  TRY_ASSIGN(const std::string path, make_checkpoint(bench, "large.safetensors", shapes));
  TRY_ASSIGN(const Daemon daemon, Daemon::start(bench.options()));
  TRY_ASSIGN(const auto holder, open_ready(path));
  // Of one layer: 230 MB, far more than any cache.
  const auto layer = std::span(shapes).first(shapes.size() / 3);
  for (const uint64_t rank_count : {2, 4, 8}) {
    for (const int process_count : {1, 2, 4, 8}) {
      if (bench.tiny() && (rank_count != 2 || process_count > 2)) continue;
      std::vector<std::vector<Slice>> slices;
      for (int number = 0; number < process_count; ++number)
        slices.push_back(rank_slices(layer, rank_count, static_cast<uint64_t>(number) % rank_count, Part::columns));
      TRY(race_ranks(bench, daemon, path, slices,
                     base::text("tp", rank_count, ", column slices, ", process_count, " processes at once")));
    }
  }
  return {};
}

}  // namespace tensord::bench
