// What every case is given, and what it gives back.
//
//   case ──► figures ──► lines on the terminal, results.json ──► plot.py
//
// A figure is a number with its spread and, where there is one, the goal it is held to.
#pragma once

#include <functional>
#include <map>
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

struct Figure {
  std::string name;
  std::string unit;  // "of ceiling", "ms", "MiB", ...
  double value = 0;
  std::optional<double> spread;  // interquartile range / median
  std::optional<Goal> goal;
  std::map<std::string, double> details;
  std::vector<double> samples;
  std::string note;

  bool is_void() const { return spread && *spread > kSpreadMax; }
  bool meets_goal() const;
};

struct Options {
  bool tiny = false;   // everything small and once: do the cases still work?
  int pair_count = 9;  // of ceiling and product
  int try_count = 3;   // how often a void measurement is repeated
  std::string folder;  // where checkpoints are made and kept
  std::string binary;  // tensord
};

// What a case works with.
class Bench {
 public:
  explicit Bench(const Options& options) : options_(options) {}
  const Options& options() const { return options_; }
  bool tiny() const { return options_.tiny; }

  void begin_case(const char* name);
  // Prints the figure as a line.
  void add(Figure figure);

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
Status run_memory(Bench& bench);
Status run_faults(Bench& bench);
Status run_strided(Bench& bench);
Status run_tensor_parallel(Bench& bench);
Status run_plan_compile(Bench& bench);

// Why figures of this build would mean nothing; empty for a build that may print them.
std::string unfit_build();

}  // namespace tensord::bench
