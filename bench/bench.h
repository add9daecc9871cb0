// What every case is given, and what it gives back.
//
//   case ──► figures ──► lines on the terminal, results.json ──► plot.py
//
// A figure is a number with its spread and, where there is one, the goal it is held to.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"

namespace tensord::bench {

using base::Result;
using base::Status;

// A range of the middle half wider than this part of the median says nothing about the product.
inline constexpr double kSpreadMax = 0.15;

struct Goal {
  enum class Kind { at_least, at_most };
  Kind kind = Kind::at_least;
  double value = 0;
};
inline Goal at_least(double value) { return {Goal::Kind::at_least, value}; }
inline Goal at_most(double value) { return {Goal::Kind::at_most, value}; }

// How another loader did the same work in the same rounds.
struct PeerFigure {
  std::string name;
  double seconds = 0;  // of one act, the median; cpu_s: user and system time, the daemon's included
  double cpu_s = 0;
  double ratio = 0;    // how many times as long as the product, round by round
  double spread = 0;   // of these
  std::string cannot;  // the reason, when there are no figures
};

struct Figure {
  std::string name;
  std::string unit;  // "of ceiling", "ms", "MiB", ...
  double value = 0;
  std::optional<double> spread;  // interquartile range / median
  std::optional<Goal> goal;
  std::map<std::string, double> details;
  std::vector<double> samples;
  std::string note;
  std::vector<PeerFigure> peers;  // in the same rounds

  bool is_void() const { return spread && *spread > kSpreadMax; }
  bool meets_goal() const;
};

struct Options {
  bool tiny = false;   // everything small and once: do the cases still work?
  int pair_count = 9;  // of ceiling and product
  int try_count = 2;   // how often a void measurement is repeated
  std::string folder;  // where checkpoints are made and kept
  std::string binary;  // tensord
  std::string python;  // of the peers' environment; empty: no peers
  std::vector<std::string> peers = {"tensord, Python", "safetensors, copied", "safetensors, mapped",
                                    "Run:ai",          "Run:ai, buffered",    "fastsafetensors"};
};

class Peer;  // peer.h

// What a case works with.
class Bench {
 public:
  explicit Bench(const Options& options);
  ~Bench();
  const Options& options() const { return options_; }
  bool tiny() const { return options_.tiny; }

  void begin_case(const char* name);
  // Prints the figure as a line.
  void add(Figure figure);
  // Says aloud, and in the JSON, what this machine cannot measure.
  void skip(std::string name, std::string reason);

  // The peer of this name, started at its first use; `number` tells several of a kind apart.
  Result<Peer*> peer(const std::string& name, int number = 0);
  // All peers give back what they hold.
  Status drop_peers();

  // All figures with the machine, the commit and the build, as results.json.
  Status write_json(const std::string& path) const;

 private:
  struct Entry {
    std::string case_name;
    Figure figure;
  };
  const Options options_;
  std::string case_name_;
  std::vector<Entry> entries_;
  std::map<std::pair<std::string, int>, std::unique_ptr<Peer>> peers_;
  std::map<std::string, std::string> versions_;  // of the peers' packages
};

struct Case {
  const char* name;
  const char* what;  // one line for --list
  Status (*run)(Bench& bench);
};

// cases_*.cc
Status run_attach(Bench& bench);
Status run_control(Bench& bench);
Status run_hot_load(Bench& bench);
Status run_cold_load(Bench& bench);
Status run_verification(Bench& bench);
Status run_group(Bench& bench);
Status run_first_tensor(Bench& bench);
Status run_churn(Bench& bench);
Status run_small(Bench& bench);
Status run_ranks(Bench& bench);
Status run_shapes(Bench& bench);
Status run_memory(Bench& bench);
Status run_faults(Bench& bench);
Status run_strided(Bench& bench);
Status run_tensor_parallel(Bench& bench);
Status run_plan_compile(Bench& bench);

// Why figures of this build would mean nothing; empty for a build that may print them.
std::string unfit_build();

}  // namespace tensord::bench
