// How things are measured: beside a ceiling, in turns.
#pragma once

#include <sys/types.h>

#include <functional>
#include <span>
#include <vector>

#include "bench/bench.h"

namespace tensord::bench {

// Quantile of unsorted samples, linear between neighbours; 0 without samples.
double quantile(std::vector<double> samples, double at);
double median(const std::vector<double>& samples);
double spread(const std::vector<double>& samples);  // interquartile range / median

struct Sample {
  Sample(double time_s, double processor_s = 0) : seconds(time_s), cpu_s(processor_s) {}
  double seconds;
  double cpu_s;  // user and system time of all who took part
};

// Runs from its construction on. The processor time is this process's and that of `others`.
class Stopwatch {
 public:
  explicit Stopwatch(std::vector<pid_t> others = {});
  Sample read() const;

 private:
  double cpu_s() const;
  std::vector<pid_t> pids_;
  double begin_cpu_s_;
  int64_t begin_ns_;
};

// Runs `work` on `thread_count` threads at once, the caller's among them; seconds from the first beginning to the last
// end. Threads are started before the clock.
Sample run_on_threads(int thread_count, const std::function<void()>& work);

// Does something once and returns what the part that counts took.
using Act = std::function<Result<Sample>()>;

struct Contender {
  std::string name;
  Act act;
};

struct Race {
  std::string ceiling;  // which of the ceilings was the fastest, by its median; the others do not count
  std::vector<double> ceiling_s, ceiling_cpu_s;
  std::vector<double> product_s, product_cpu_s;
  std::vector<double> ratios;  // ceiling_s / product_s, round by round: 1 is as fast as the ceiling
  std::vector<PeerFigure> peers;
  int try_count = 0;
};

// All once to warm up, then rounds of all in turns, each round beginning with another one. Repeated while the spread of
// the ratios is too wide, as often as the options say, without the peers; the try with the smallest spread counts. A
// peer that fails, or that takes a multiple of the time that the suite has, is out with the reason.
Result<Race> race(const Options& options, std::span<const Contender> ceilings, const Act& product,
                  std::span<const Contender> peers = {});

// The `count` fastest of all, by `round_count` runs of each.
Result<std::vector<Contender>> fastest(std::vector<Contender> all, size_t count, int round_count);

// The race as a figure "of ceiling"; `bytes` per act gives the rates.
Figure race_figure(std::string name, const Race& race, double bytes, std::optional<Goal> goal);
// The product's time as a figure in ms, the ceiling's beside it.
Figure time_figure(std::string name, const Race& race, std::optional<Goal> goal);

}  // namespace tensord::bench
