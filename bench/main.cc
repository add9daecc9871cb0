// tensord_bench: named cases, figures against ceilings.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <set>

#include "base/text.h"
#include "bench/bench.h"
#include "bench/peer.h"

namespace tensord::bench {
namespace {

constexpr Case kCases[] = {
    {"attach", "a resident artifact: from open to a usable mapping, alone, beside 99 and in bursts of 100", run_attach},
    {"hot_load", "page cache to verified replica, 2 and 8 GB, against raw loops into touched memory", run_hot_load},
    {"cold_load", "disk to verified replica, against the best O_DIRECT reader found", run_cold_load},
    {"group", "four tp4 ranks arriving at different times, cold: time, and bytes from the disk", run_group},
    {"first_tensor", "until the first tensor can be used: cold, hot, resident", run_first_tensor},
    {"small", "100,000 tensors of 4 KiB: open to all usable, load_into of all", run_small},
    {"churn", "load and unload again and again, and the memory afterwards", run_churn},
    {"verification", "what hashing adds to a raw read, by two loops", run_verification},
    {"strided", "slices into own memory, rows of 256 B to 1 MiB, against a loop of memcpy", run_strided},
    {"tp", "tensor-parallel ranks of a 2 GB checkpoint into own memory, against the same loop", run_tensor_parallel},
    {"ranks", "column slices of tp2, tp4, tp8 by 1 to 8 processes at once, against the loop in as many", run_ranks},
    {"shapes", "3-D slices, transposes and casts, against loops written by hand", run_shapes},
    {"plan_compile", "from index expressions to a checked plan: Qwen3-14B and 6,144 experts", run_plan_compile},
    {"memory", "memory of the daemon and of 1 to 8 processes (PSS), ours and safetensors'", run_memory},
    {"faults", "page faults and allocations in a warm load_into", run_faults},
    {"control", "status requests a second", run_control},
};

constexpr const char* kHelp = R"(tensord_bench: benchmarks of tensord
  --case NAME      only this case; may be given several times
  --list           the cases
  --json FILE      write all figures, with machine, commit and build, to FILE
  --pairs COUNT    pairs of ceiling and product per figure (9)
  --tiny           everything small and once: do the cases work? Prints no figures
  --folder FOLDER  where checkpoints are made and kept, 13 GB (default: data, beside this program)
  --peers PYTHON   race other loaders, too: the python that `peers.py install` printed
  --peer NAME      only this peer; may be given several times
  --binary FILE    the daemon's program (default: ../tensord, seen from this program)
Exit status: 0 done, 1 a case failed, 2 bad arguments or a build that may not print figures.
A goal that is missed is printed as such and changes nothing.
)";

struct CommandLine {
  Options options;
  std::set<std::string> cases;
  std::string json;
  enum class Wish { run, list, help } wish = Wish::run;
};

Result<CommandLine> parse(int argc, char** argv) {
  CommandLine line;
  const auto here = std::filesystem::read_symlink("/proc/self/exe").parent_path();
  line.options.folder = here / "data";
  line.options.binary = here.parent_path() / "tensord";
  bool peers_chosen = false;
  for (int at = 1; at < argc; ++at) {
    const std::string flag = argv[at];
    if (flag == "--help" || flag == "-h") {
      line.wish = CommandLine::Wish::help;
    } else if (flag == "--list") {
      line.wish = CommandLine::Wish::list;
    } else if (flag == "--tiny") {
      line.options.tiny = true;
    } else if (++at == argc) {
      return base::fail(base::Code::invalid_argument, flag + ": unknown, or its value is missing");
    } else if (flag == "--case") {
      line.cases.insert(argv[at]);
    } else if (flag == "--json") {
      line.json = argv[at];
    } else if (flag == "--folder") {
      line.options.folder = std::filesystem::absolute(argv[at]);
    } else if (flag == "--binary") {
      line.options.binary = std::filesystem::absolute(argv[at]);
    } else if (flag == "--peers") {
      line.options.python = argv[at];
    } else if (flag == "--peer") {
      if (!std::exchange(peers_chosen, true)) line.options.peers.clear();
      line.options.peers.emplace_back(argv[at]);
    } else if (flag == "--pairs") {
      line.options.pair_count = std::max(1, std::atoi(argv[at]));
    } else {
      return base::fail(base::Code::invalid_argument, flag + ": unknown");
    }
  }
  for (const std::string& name : line.cases) {
    if (std::none_of(std::begin(kCases), std::end(kCases), [&](const Case& one) { return name == one.name; })) {
      return base::fail(base::Code::invalid_argument, "--case " + name + ": there is no such case; see --list");
    }
  }
  if (line.options.tiny) {
    line.options.pair_count = 2;
    line.options.try_count = 1;
    line.options.folder += "/tiny";
  }
  return line;
}

int run(const CommandLine& line) {
  if (const std::string unfit = unfit_build(); !unfit.empty() && !line.options.tiny) {
    std::fprintf(stderr, "tensord_bench: %s prints no figures; use a release build, or --tiny\n", unfit.c_str());
    return 2;
  }
  std::filesystem::create_directories(line.options.folder);
  ::signal(SIGPIPE, SIG_IGN);  // a peer that died is an error of its own
  if (line.options.python.empty()) std::puts("without peers (--peers)");
  Bench bench(line.options);
  int status = 0;
  for (const Case& one : kCases) {
    if (!line.cases.empty() && !line.cases.contains(one.name)) continue;
    bench.begin_case(one.name);
    if (const Status done = one.run(bench); !done) {
      std::fprintf(stderr, "tensord_bench: %s: %s\n", one.name, done.error().message.c_str());
      status = 1;
    }
  }
  if (line.json.empty() || line.options.tiny) return status;
  std::error_code ignored;  // where it matters, writing fails
  std::filesystem::create_directories(std::filesystem::absolute(line.json).parent_path(), ignored);
  if (const Status written = bench.write_json(line.json); !written) {
    std::fprintf(stderr, "tensord_bench: %s\n", written.error().message.c_str());
    return 1;
  }
  return status;
}

}  // namespace
}  // namespace tensord::bench

int main(int argc, char** argv) {
  using tensord::bench::CommandLine;
  const auto line = tensord::bench::parse(argc, argv);
  if (!line) {
    std::fprintf(stderr, "tensord_bench: %s\n", line.error().message.c_str());
    return 2;
  }
  if (line->wish == CommandLine::Wish::help) {
    std::fputs(tensord::bench::kHelp, stdout);
    return 0;
  }
  if (line->wish == CommandLine::Wish::list) {
    for (const auto& one : tensord::bench::kCases) std::printf("%-14s%s\n", one.name, one.what);
    return 0;
  }
  return tensord::bench::run(*line);
}
